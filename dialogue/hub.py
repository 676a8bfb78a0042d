"""The model hub: whether it answers at all, and what `--push_to_hub` sends there."""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub.utils import get_session

from dialogue.errors import UserError, in_a_line
from dialogue.storage import read_json

if TYPE_CHECKING:
    from transformers import TrainingArguments


@cache
def reachable() -> bool:
    """One request of at most five seconds. The hub's own client would retry each file for half a minute. Honours
    HF_HUB_OFFLINE, HF_ENDPOINT and the proxy settings."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # no route, no name, a refused or broken connection: which one makes no difference here
        return False
    return True


def check_login(arguments: "TrainingArguments") -> None:
    """Raises UserError unless somebody is logged in where a run will send something: after hours would be too late."""
    hub, report = huggingface_hub.HfApi(token=arguments.hub_token), arguments.report_to or []
    for flag, asked, log_in, command in (
        ("--push_to_hub", arguments.push_to_hub, lambda: hub.whoami(), "hf auth"),
        ("--report_to wandb", "wandb" in report, lambda: import_module("wandb").login(), "wandb"),
    ):
        try:
            if asked:
                log_in()
        except Exception as error:  # no token, a wrong one, no network: the clients have an exception for each
            raise UserError(f"{flag}: {in_a_line(error)}; log in with `{command} login`, or leave it out") from error


def push(adapters: Path, merged: Path, arguments: "TrainingArguments") -> list[str]:
    """Upload whole folders; returns the addresses of the repositories, which are made where there are none.

    The merged model goes to `hub_model_id` (else its folder's name), the adapters beside it with "-lora" at the
    end. Adapters of a base model in a folder stay: nobody else could load them. Raises UserError where the
    hub refuses; both folders are kept.
    """
    api = huggingface_hub.HfApi(token=arguments.hub_token)
    name = arguments.hub_model_id or merged.resolve().name
    folders = {name: merged}
    config = read_json(adapters / "adapter_config.json", {"base_model_name_or_path": str})
    if not Path(config["base_model_name_or_path"]).is_dir():
        folders[f"{name}-lora"] = adapters
    addresses = []
    for repository, folder in folders.items():
        try:
            made = api.create_repo(repository, private=arguments.hub_private_repo, exist_ok=True)
            api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Fine-tuned with LoRA")
        except Exception as error:
            raise UserError(
                f"{folder} was not uploaded: {in_a_line(error)}; it is kept: "
                f"`hf upload {repository} {folder}` tries again"
            ) from error
        addresses.append(str(made))
    return addresses
