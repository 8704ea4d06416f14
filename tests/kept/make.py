"""Writes what this version of the package writes to ``tests/data/checkpoints/VERSION``, to be kept for good.

    python tests/kept/make.py

Run it once in an environment of each host before a release. Files that exist are left alone: they are what that version
wrote. A quantizer of an algorithm that came later is added to them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from kept import CHECKPOINTS, CUT, answers, cases, description, images, installed, made, model_answers, recipe, runs
from safetensors.torch import load_file, save, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

from cuts import Killed, cut_at

import fat_plugins
from fat_plugins.recipes import Options, load_recipe, load_run, train

#: what is read back of a run; pages and tables are not
KEPT = ("recipe.yaml", "report.json", "checkpoint/last.safetensors", "state/*", "expected.safetensors")
#: and more of some: a report can be made again; float training is over
MORE = {"fat": ("metrics.json",), CUT: ("checkpoint/float.safetensors",)}


def quantizers(path: Path) -> None:
    """States of single quantizers."""
    tensors = load_file(path) if path.exists() else {}
    known = description(path, "cases") if path.exists() else {}
    for name, case in cases():
        if name in known:
            continue
        quantizer, x = made(case)
        known[name] = case
        tensors.setdefault(f"{quantizer.role} input", x)  # the same for all
        tensors |= {f"{name}/state/{k}": v.contiguous().clone() for k, v in quantizer.state_dict().items()}
        tensors |= {f"{name}/{k}": v.clone() for k, v in answers(quantizer, x).items()}
    path.write_bytes(save(tensors, metadata={"cases": json.dumps(known)}))


def run(host: str, name: str, folder: Path) -> None:
    """One run of a recipe; the one to be cut is cut at its eighth step."""
    with tempfile.TemporaryDirectory() as temporary:
        text, whole = Path(temporary) / "recipe.yaml", Path(temporary) / "run"
        text.write_text(recipe(host, name))
        if name == CUT:
            try:
                with cut_at(step=7):
                    train(load_recipe(text), whole, options=Options(save_steps=1))
            except Killed:
                (whole / "state" / "training.previous.safetensors").unlink(missing_ok=True)
        else:
            train(load_recipe(text), whole)
            loaded = load_run(whole, "last")
            save_file({k: v.contiguous() for k, v in model_answers(loaded.model, images()).items()},
                      whole / "expected.safetensors")  # fmt: skip
        for pattern in (*KEPT, *MORE.get(name, ())):
            for file in whole.glob(pattern):
                target = folder / file.relative_to(whole)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def main() -> None:
    folder = CHECKPOINTS / fat_plugins.__version__
    folder.mkdir(parents=True, exist_ok=True)
    quantizers(folder / "quantizers.safetensors")
    for host, _ in installed():
        for name in runs(host):
            if not (folder / host / name).exists():
                run(host, name, folder / host / name)


if __name__ == "__main__":
    main()
