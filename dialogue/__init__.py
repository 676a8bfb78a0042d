"""What the two scripts call, one module for each station that a dialogue passes through."""

import logging

# Said while bitsandbytes is imported, about a kernel for 4 bits, which nothing here uses. For everyone who imports
# bitsandbytes (peft does) it has to be set before.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
