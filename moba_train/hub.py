"""Whether the Hugging Face hub can be reached.

Where it cannot, huggingface_hub itself tries for 23 seconds before it says so, and again for every file.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path

from huggingface_hub.constants import ENDPOINT
from huggingface_hub.utils import get_session

CONNECT_SECONDS = 4.0  # three tries of TCP


def out_of_reach(location: str) -> bool:
    """Whether ``location`` is no folder or file but a hub name, and no connection to the hub can be made, so that only
    what was downloaded before is left (``local_files_only``). A hub that answers late or with errors is in reach:
    huggingface_hub asks it again."""
    return not Path(location).exists() and not _connects()


@functools.cache
def _connects() -> bool:
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(_answers()), daemon=True)
    asking.start()
    # Connecting and reading have their own time-outs, looking up the name has none: a name server may say nothing.
    asking.join(3 * CONNECT_SECONDS)
    return answers == [True]


def _answers() -> bool:
    try:
        # The session that will be used, with its proxies and certificates.
        get_session().head(ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception as error:  # of httpx or httpx2, by the version of huggingface_hub
        return type(error).__name__ not in ("ConnectError", "ConnectTimeout")
    return True
