"""What a type checker says of calls, and an editor shows. mypy reads this (`files` in pyproject.toml), nothing runs it.

A line that must be refused says which error is expected; an error that does not come is one for mypy, too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import TensorDataset

import fmextract as fm


def calls(model: torch.nn.Module, data: TensorDataset, acts: fm.Activations) -> None:
    made: fm.Activations = fm.extract("photos/", "resnet50", "acts.h5", layers="conv#0", precision="bf16", size=(8, 8))
    plan: fm.Plan = fm.plan(["a.png", Path("b.png")], model, codec="zstd", device=torch.device("cpu"), progress=False)
    fm.extract(data, model, Path("acts.h5"), plan=plan, label=[1, 2], weights=Path("w.pth"), max_failures="5%")
    rows: list[fm.ModuleRow] = [*fm.layers(model)]
    checked: fm.Verification = fm.verify(acts)
    fm.compare(made, "b.h5", layers=[row.path for row in rows])
    fm.export(made, to="npy", out="arrays/")
    fm.show_maps(acts, "a.png", "maps/", order="first")
    fm.show_maps(model=model, input="a.png", out=Path("maps.png"), size=8)
    assert checked.ok

    fm.extract("photos/", model, "acts.h5", batchsize=4)  # type: ignore[call-arg]
    fm.plan("photos/", model, selectors="conv")  # type: ignore[call-arg]
    fm.extract("photos/", model, "acts.h5", precision="bf32")  # type: ignore[arg-type]
    fm.extract("photos/", 5, "acts.h5")  # type: ignore[arg-type]
    fm.extract({"a": 1}, model, "acts.h5")  # type: ignore[dict-item]
    fm.bench("photos/", model, codec="zip")  # type: ignore[arg-type]
    fm.export(made, to="npz", out="arrays/")  # type: ignore[arg-type]
    fm.show_top(acts, "conv", 1, "top.png", theme="blue")  # type: ignore[arg-type]
    fm.show_maps(acts, "a.png", "maps/", columns=3)  # type: ignore[call-overload]
    fm.show_maps("acts.h5", "a.png", "maps/", model=model)  # type: ignore[call-overload]
    fm.describe(model)  # type: ignore[attr-defined]
