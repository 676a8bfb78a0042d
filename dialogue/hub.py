"""Whether the model hub answers at all."""

from functools import cache

import huggingface_hub
from huggingface_hub.utils import get_session


@cache
def reachable() -> bool:
    """One request of at most five seconds. The hub's own client would retry each file for half a minute.

    Honours HF_HUB_OFFLINE, HF_ENDPOINT and the proxy settings.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # no route, no name, a refused or broken connection: which one makes no difference here
        return False
    return True
