"""Networks, weights and preprocessing against torchvision's, timm's and torch's own."""

from __future__ import annotations

import json
import pickle
import re
import sys
import types
import warnings
from collections import OrderedDict

import PIL.Image
import pytest
import timm
import torch
import torchvision
from odd_images import jpeg, photo
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import functional as v1

from fmextract.errors import ConfigError, MissingExtra, ModelError
from fmextract.inputs import preprocessing
from fmextract.inputs.decoding import decode
from fmextract.inputs.preprocessing import CustomPreprocess, describe_preprocess, normalise
from fmextract.model import providers
from fmextract.model.loading import load_model
from fmextract.model.weights import weights_digest
from fmextract.records import Preprocess

SIMPLE = Preprocess(resize=32, crop=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.conv(x))
        return out


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A module of the user's, importable from the working directory."""
    (tmp_path / "users_models.py").write_text(
        "import torch\nfrom torch import nn\n"
        "from torchvision.models import ResNet18_Weights\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        "def net_with_preset():\n    return net(), ResNet18_Weights.DEFAULT.transforms()\n"
        "def net_with_function():\n    return net(), prepare\n"
        "def prepare(image):\n    return torch.zeros(3, 8, 9)\n"
        "def broken():\n    raise RuntimeError('no such layer')\n"
        "ready = net()\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("users_models", None)


def same_values(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# ------------------------------------------------------------------------------------------------------ random


@pytest.mark.parametrize("name", ["squeezenet1_1", "torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_050"])
def test_random_weights_are_those_of_the_seeded_constructor(name):
    before = torch.random.get_rng_state()
    loaded = load_model(name, "random:7")
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        short = name.rpartition(":")[2]
        own = timm.create_model(short) if name.startswith("timm") else torchvision.models.get_model(short, weights=None)
    assert same_values(loaded.module, own)
    assert not loaded.module.training
    assert loaded.weights == "random:7"
    assert loaded.weights_sha256 == weights_digest(own) == load_model(name, "random:7").weights_sha256
    assert loaded.weights_sha256 != load_model(name, "random:8").weights_sha256
    assert loaded.origin["provider"] in ("torchvision", "timm")
    assert json.dumps(dict(loaded.origin))


def test_builders_that_warn_or_would_fetch_a_backbone_are_quiet(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    assert load_model("googlenet", "random:0").module.aux_logits
    loaded = load_model("segmentation/lraspp_mobilenet_v3_large", "random:0", size="64x96")
    assert loaded.preprocess.size == (64, 96)


def test_a_quantized_name_gives_the_quantized_network():
    """Equal to torchvision's own builder with quantize=True, which without it builds the float version."""
    found = load_model("quantized_resnet18", weights="random:3").module
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of this kind of quantization
        expected = torchvision.models.get_model("quantized_resnet18", weights=None, quantize=True).eval()
    assert type(found.conv1) is type(expected.conv1)
    assert found.conv1.weight().is_quantized
    inputs = torch.rand(2, 3, 64, 64)
    assert torch.equal(found(inputs), expected(inputs))


@pytest.mark.parametrize("text", ["random:", "random:-1", "random:x", "random:1.5"])
def test_a_seed_is_a_whole_number(text):
    with pytest.raises(ModelError, match="random:SEED"):
        load_model("squeezenet1_1", text)


# ----------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b1", "vgg11", "vit_b_16", "swin_t", "inception_v3"])
def test_inputs_agree_with_the_transforms_of_the_weights(name):
    """Within one level of 255, after normalisation."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    preprocess = providers._torchvision_preprocess(name)
    for image in (photo(451, 300), photo(200, 333)):
        made = normalise(decode(image, preprocess).pixels[None], preprocess)[0]
        difference = (made - weights.transforms()(image)).abs()
        assert (difference.amax((1, 2)) <= 1.001 / 255 / torch.tensor(preprocess.std)).all()


def test_every_preset_of_torchvision_is_understood():
    kinds = {}
    for name in torchvision.models.list_models():
        for weights in torchvision.models.get_model_weights(name):
            preset = weights.transforms()
            made = preprocessing.from_preset(preset, "here")
            kinds.setdefault(type(preset).__name__, []).append(made)
            if hasattr(preset, "crop_size"):
                assert made.size == (preset.crop_size[0], preset.crop_size[-1])
                assert (made.mean, made.std) == (tuple(preset.mean), tuple(preset.std))
                assert made.interpolation == preset.interpolation.value
    assert kinds.keys() == set(preprocessing.PRESETS)
    assert all(made is None for made in kinds["OpticalFlow"])
    assert all(made.size is None for made in kinds["ObjectDetection"] + kinds["SemanticSegmentation"])
    assert not any(made.antialias for made in kinds["VideoClassification"])


def test_the_video_preset_on_a_frame():
    preset = torchvision.models.video.R3D_18_Weights.DEFAULT.transforms()
    preprocess = preprocessing.from_preset(preset, "video")
    frame = v1.pil_to_tensor(photo(451, 300))
    expected = preset(frame[None])[:, 0]
    made = normalise(decode(frame, preprocess).pixels[None], preprocess)[0]
    assert ((made - expected).abs() <= 1.001 / 255 / min(preprocess.std)).all()


@pytest.mark.parametrize("name", ["resnet18", "vit_base_patch14_dinov2", "tf_efficientnet_lite0", "mixer_b16_224"])
def test_timm_inputs_agree_with_its_own_transform(name):
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    preprocess = providers._timm_preprocess_of(name)
    assert isinstance(preprocess, Preprocess)
    expected = timm.data.create_transform(**config, is_training=False)(photo())
    made = normalise(decode(photo(), preprocess).pixels[None], preprocess)[0]
    assert ((made - expected).abs() <= 1.001 / 255 / min(preprocess.std)).all()


@pytest.mark.parametrize(
    "change",
    [{"crop_mode": "border"}, {"input_size": (3, 64, 96)}, {"crop_mode": "squash"}, {"interpolation": "lanczos"}],
)
def test_odd_timm_configurations_do_what_timm_does(change):
    config = {
        "input_size": (3, 64, 64), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3,
        "crop_pct": 0.9, "crop_mode": "center", **change,
    }  # fmt: skip
    preprocess = providers._timm_preprocess(config, "here")
    expected = timm.data.create_transform(**config, is_training=False)(photo())
    made = decode(photo(), preprocess)
    values = made.pixels if made.ready else normalise(made.pixels[None], preprocess)[0]
    assert preprocess.size == config["input_size"][1:]
    assert ((values - expected).abs() <= 1.001 / 255 / 0.5).all()


@pytest.mark.parametrize(
    ("preprocess", "size", "expected"),
    [
        ("model", None, (256, (224, 224))),
        ("resnet50", None, (232, (224, 224))),
        ("timm:resnet18", None, (235, (224, 224))),
        ("size=40,crop=32", None, (40, (32, 32))),
        ("model", "112", (128, (112, 112))),
        (SIMPLE, None, (32, (32, 32))),
        (torchvision.models.ResNet50_Weights.DEFAULT.transforms(), 448, (464, (448, 448))),
    ],
    ids=str,
)
def test_ways_to_name_the_preprocessing(preprocess, size, expected):
    made = load_model("squeezenet1_1", "random:0", preprocess, size).preprocess
    assert (made.resize, made.crop) == expected
    described = json.loads(json.dumps(describe_preprocess(made)))
    assert described["size"] == list(made.size)
    assert described["mean"] == list(made.mean)


def test_custom_preprocessing_is_measured_and_described(code):
    made = load_model("squeezenet1_1", "random:0", "users_models:prepare").preprocess
    assert isinstance(made, CustomPreprocess)
    assert made.size == (8, 9)
    assert decode(jpeg(), made).pixels.shape == (3, 8, 9)
    described = {"kind": "custom", "callable": "users_models:prepare", "size": [8, 9]}
    assert describe_preprocess(made) == described
    assert load_model("squeezenet1_1", "random:0", v1.to_tensor).preprocess.size == (256, 320)
    assert describe_preprocess(None) == {"kind": "none"}


@pytest.mark.parametrize(
    ("model", "preprocess", "size", "message"),
    [
        ("raft_small", "model", None, "brings no preprocessing. .*--preprocess"),
        ("squeezenet1_1", "raft_small", None, "brings no preprocessing"),
        ("lraspp_mobilenet_v3_large", "model", None, "--size HxW"),
        ("squeezenet1_1", "no_such_model", None, "no model 'no_such_model'"),
        ("squeezenet1_1", "json:dumps", None, "a grey 320 x 256 picture gave TypeError"),
        ("squeezenet1_1", "sys:maxsize", None, "expected a callable"),
        ("squeezenet1_1", v1.to_tensor, "224", "--size cannot change"),
        ("squeezenet1_1", "size=big", None, "expected a size"),
        ("squeezenet1_1", "model", "big", "--size: expected a size"),
        ("squeezenet1_1", 3, None, "expected a callable"),
    ],
)
def test_preprocessing_that_cannot_be(model, preprocess, size, message):
    with pytest.raises(ConfigError, match=message):
        load_model(model, "random:0", preprocess, size)


def test_ready_inputs_need_no_preprocessing():
    assert load_model("raft_small", "random:0", "none").preprocess is None
    assert load_model("squeezenet1_1", "random:0", None).preprocess is None


# ------------------------------------------------------------------------------------------------- user's code


def test_modules_of_the_users(code):
    for text in ("users_models:net", f"{code}/users_models.py:net", "users_models:ready"):
        loaded = load_model(text, preprocess=SIMPLE)
        assert isinstance(loaded.module, nn.Sequential)
        assert not loaded.module.training
        assert loaded.name == text
    one, two = (load_model("users_models:net", "random:3", SIMPLE) for _ in range(2))
    assert one.weights_sha256 == two.weights_sha256 == load_model("users_models:net", "random:3", SIMPLE).weights_sha256
    preset = load_model("users_models:net_with_preset").preprocess
    assert (preset.resize, preset.crop) == (256, (224, 224))
    assert load_model("users_models:net_with_function").preprocess.size == (8, 9)


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("users_models:net", "default", "brings no preprocessing"),
        ("users_models:broken", "default", "RuntimeError: no such layer"),
        ("users_models:number", "default", "TypeError"),
        ("users_models:missing", "default", "has no 'missing'"),
        ("users_models:prepare", "default", "TypeError"),
        ("users_models:net", "IMAGENET1K_V1", "no named weights"),
        ("users_models:ready", "random:0", "built already"),
        ("builtins:dict", "default", "expected a torch module"),
        ("nowhere/file.py:net", "default", "there is no file"),
    ],
)
def test_user_code_that_gives_no_model(code, model, weights, message):
    with pytest.raises(ConfigError, match=message):
        load_model(model, weights)


def test_a_module_given_is_left_as_it_is():
    module = Tiny().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loaded = load_model(module, preprocess=SIMPLE)
    assert loaded.module is module
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert (loaded.name, loaded.preprocess) == ("Tiny", SIMPLE)
    assert load_model(module).preprocess is None
    with pytest.raises(ModelError, match="a module given is never changed"):
        load_model(module, "random:0")


# ------------------------------------------------------------------------------------------------ weight files


def wrap(state, kind):
    return {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": {}},
        "parallel": {f"module.{name}": value for name, value in state.items()},
        "compiled": {"model": {f"_orig_mod.{name}": value for name, value in state.items()}},
    }[kind]


@pytest.fixture
def users_module(monkeypatch):
    """Gives a function a name that --model can use."""

    def place(make):
        monkeypatch.setitem(sys.modules, "users_function", types.SimpleNamespace(make=make))
        return "users_function:make"

    return place


@pytest.fixture(scope="module")
def squeezenet():
    return load_model("squeezenet1_1", "random:5").module


@pytest.mark.parametrize("kind", ["plain", "state_dict", "model", "parallel", "compiled"])
def test_a_pth_file_gives_what_load_state_dict_gives(tmp_path, squeezenet, kind):
    path = tmp_path / "weights.pth"
    torch.save(wrap(squeezenet.state_dict(), kind), path)
    loaded = load_model("squeezenet1_1", str(path))
    own = torchvision.models.squeezenet1_1(weights=None)
    own.load_state_dict(squeezenet.state_dict())
    assert same_values(loaded.module, own)
    assert loaded.weights == "file:weights.pth"
    assert loaded.weights_sha256 == weights_digest(own)
    assert loaded.preprocess.crop == (224, 224)


def test_a_safetensors_file(tmp_path, squeezenet):
    save_file(squeezenet.state_dict(), tmp_path / "weights.safetensors")
    assert same_values(load_model("squeezenet1_1", str(tmp_path / "weights.safetensors")).module, squeezenet)


def test_the_published_densenet_files_have_other_names(tmp_path, users_module):
    def make():
        return torchvision.models.DenseNet(growth_rate=2, block_config=(2, 1), num_init_features=4, bn_size=1)

    own = make()
    published = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value
        for name, value in own.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer2.norm.1.weight" in published
    torch.save(published, tmp_path / "densenet.pth")
    assert same_values(load_model(users_module(make), str(tmp_path / "densenet.pth"), SIMPLE).module, own)


def test_a_model_that_has_a_child_named_module_keeps_its_names(tmp_path, users_module):
    def make():
        return nn.Sequential(OrderedDict(module=Tiny()))

    own = make()
    torch.save(own.state_dict(), tmp_path / "own.pth")
    assert same_values(load_model(users_module(make), str(tmp_path / "own.pth"), SIMPLE).module, own)


def test_weights_that_do_not_fit_name_the_first_few(tmp_path, squeezenet):
    state = squeezenet.state_dict()
    first, *rest = state
    torch.save({**{name: state[name] for name in rest}, "extra.weight": torch.zeros(1)}, tmp_path / "names.pth")
    with pytest.raises(ModelError, match=rf"1 missing: {first}; 1 not in the model: extra\.weight"):
        load_model("squeezenet1_1", str(tmp_path / "names.pth"))
    torch.save({**state, first: torch.zeros(1, 2)}, tmp_path / "shapes.pth")
    with pytest.raises(ModelError, match=r"do not fit the model: .*size mismatch for " + first):
        load_model("squeezenet1_1", str(tmp_path / "shapes.pth"))
    torch.save(load_model("mobilenet_v3_small", "random:0").module.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"52 missing: .* …;") as caught:
        load_model("squeezenet1_1", str(tmp_path / "other.pth"))
    assert len(str(caught.value)) < 700


class Exploit:
    """What a crafted file holds: loading it as a pickle would make a folder."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin", "weights.tar", "weights.unknown"])
@pytest.mark.parametrize("legacy", [True, False, None])
def test_no_pickle_is_executed(tmp_path, name, legacy):
    marker = tmp_path / "executed"
    content = {"state_dict": {"x": torch.zeros(1)}, "payload": Exploit(marker)}
    if legacy is None:
        (tmp_path / name).write_bytes(pickle.dumps(content["payload"]))
    else:
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match=r"cannot load weights .* they may run code"):
        load_model("squeezenet1_1", str(tmp_path / name))
    assert not marker.exists()
    if legacy is False:
        torch.load(tmp_path / name, weights_only=False)  # the file does what it says where it is let
        assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cannot load weights"), (b"not a file of weights", "cannot load weights"), (None, "there is no file")],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_files_that_hold_no_weights(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model("squeezenet1_1", str(tmp_path / name))


def test_a_file_of_something_else(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ModelError, match=r"holds no state dict .* but list"):
        load_model("squeezenet1_1", str(tmp_path / "list.pth"))


# ---------------------------------------------------------------------------------------------- names, downloads


def test_unknown_names_show_the_closest():
    with pytest.raises(ModelError, match=r"no model 'resnt50'. Closest: .*resnet50"):
        load_model("resnt50")
    with pytest.raises(ModelError, match=r"timm has no model 'resnet81'. Closest: .*resnet18"):
        load_model("timm:resnet81")
    with pytest.raises(ModelError, match=r"'resnet50' has no weights 'V3'.*IMAGENET1K_V1, IMAGENET1K_V2, random:SEED"):
        load_model("resnet50", "V3")
    with pytest.raises(ModelError, match="no model ''"):
        load_model("")


@pytest.mark.parametrize("prefix", ["hf", "hub", "open_clip"])
def test_prefixes_of_later_versions_say_so(prefix):
    with pytest.raises(ConfigError, match=f"{prefix}:some/model.*not supported in this version.*timm:NAME"):
        load_model(f"{prefix}:some/model")
    with pytest.raises(ConfigError, match="not supported in this version"):
        load_model("squeezenet1_1", "random:0", f"{prefix}:some/model")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No machine can be reached: everything goes to a proxy that is not there."""
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("weights", ["default", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"])
def test_a_failed_download_says_what_to_do_and_leaves_stdout_alone(offline, capsys, weights):
    place = offline / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    with pytest.raises(ModelError) as caught:
        load_model("squeezenet1_1", weights)
    for part in (str(place), "https://download.pytorch.org", "--weights FILE", "--weights random:0"):
        assert part in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path, capsys):
    """A port that nobody listens on; to wait between retries would be seen."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    with pytest.raises(ModelError, match=r"could not build 'vit_tiny_patch16_224'.*--weights FILE"):
        load_model("timm:vit_tiny_patch16_224")
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err
    assert constants.HF_HUB_OFFLINE is False


def test_weights_in_the_cache_need_no_network(offline, squeezenet, monkeypatch):
    place = offline / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    place.parent.mkdir(parents=True)
    torch.save(squeezenet.state_dict(), place)
    loaded = load_model("squeezenet1_1")
    assert same_values(loaded.module, squeezenet)
    assert loaded.weights == "SqueezeNet1_1_Weights.IMAGENET1K_V1"
    torch.save({"wrong": torch.zeros(1)}, place)
    with pytest.raises(ModelError, match="building 'squeezenet1_1' raised RuntimeError"):
        load_model("squeezenet1_1")


def test_timm_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fmextract\[timm\]'"):
        load_model("timm:resnet18", "random:0")


# ------------------------------------------------------------------------------------------------------ digest


def test_the_digest_follows_names_types_shapes_and_values():
    def digest(**values):
        module = nn.Module()
        for name, value in values.items():
            module.register_buffer(name, value)
        return weights_digest(module)

    base = torch.arange(6, dtype=torch.float32)
    assert digest(a=base, b=base) == digest(b=base.clone(), a=base.clone())
    assert digest(a=base.reshape(2, 3).T.contiguous().T) == digest(a=base.reshape(2, 3))
    different = [
        {"a": base}, {"b": base}, {"a": base.double()}, {"a": base.reshape(2, 3)}, {"a": base.bfloat16()},
        {"a": base + 1}, {"a": base.int()}, {"a": torch.tensor(0.0)}, {"a": torch.zeros(0)}, {"a": base > 2},
    ]  # fmt: skip
    assert len({digest(**values) for values in different}) == len(different)


def test_state_that_is_no_tensor_counts_too():
    class Extra(nn.Module):
        value = 1

        def get_extra_state(self):
            return {"scale": self.value}

    one, two = Extra(), Extra()
    assert weights_digest(one) == weights_digest(two)
    two.value = 2
    assert weights_digest(one) != weights_digest(two)


def test_pil_images_reach_custom_preprocessing_as_rgb(code):
    made = CustomPreprocess(lambda image: v1.to_tensor(image) * (image.mode == "RGB"), "here", (5, 6))
    assert decode(PIL.Image.new("L", (6, 5), 255), made).pixels.min() == 1
