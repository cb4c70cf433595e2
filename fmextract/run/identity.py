"""What decides the values of a run: the fields that two runs of the same outcome share."""

from __future__ import annotations

from fmextract.inputs import preprocessing
from fmextract.planning import Identity
from fmextract.run import provenance
from fmextract.run.prepare import Prepared


def identity(prepared: Prepared) -> Identity:
    """What must be the same for a run to be taken up again: everything that decides a stored value."""
    config, loaded = prepared.config, prepared.loaded
    source = dict(prepared.source.fingerprint())
    code, not_covered = provenance.code_facts(
        prepared.before, provenance.code_of(loaded), prepared.inspection.reductions, source
    )
    return {
        "model": loaded.name,
        "weights": loaded.weights_sha256,
        "preprocess": preprocessing.describe_preprocess(loaded.preprocess),
        "input_shape": list(prepared.input_shape),
        "exif": config.exif,
        "jpeg_decoder": config.jpeg_decoder,
        "layers": [p.tap.name for p in prepared.probed],
        "precision": config.precision,
        "memory_format": config.memory_format,
        "compile": config.compile,
        "batch_size": config.batch_size,
        "device": prepared.device.type,
        "dtype": config.dtype,
        "clip": config.clip,
        "keep_bits": config.keep_bits,
        "codec": config.codec,
        "level": config.level,
        "top_k": config.top_k,
        "seed": config.seed,
        "random": prepared.random,
        "max_error": config.max_error if config.precision == "auto" else None,
        "source": {name: value for name, value in source.items() if name not in ("packages", "not_covered")},
        "code": code,
        "not_covered": not_covered,
    }
