"""Files from anywhere: no code in them runs, none takes more memory or time than it is worth, and none is
followed out of its folder."""

import builtins
import io
import json
import os
import random
import re
import resource
import struct
import sys
import time
import zipfile
from pathlib import Path

import torch

from tests.faults.table import MUTATIONS, SEED, Case, Outcome, finished, refused
from tests.helpers.stages import ROOT

SECONDS = 10
MEGABYTES = 400


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile(plant):
    """Exports a model whose file has something planted: it must be refused quickly, in little memory."""

    def do(world):
        content = torch.load(world.teacher, weights_only=True)
        path = world.tmp / "hostile.pth"
        mark = world.tmp / "ran"
        content = plant(content, mark) or content
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        outcome = quickly(lambda: world.call("export_to_hf", "--ckpt", path, "--out", world.tmp / "new"))
        assert not mark.exists()
        return outcome

    return do


def quickly(do) -> Outcome:
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    outcome = do()
    assert time.process_time() - begin < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024 * MEGABYTES
    return outcome


def calls(function, *arguments):
    """A call that leaves a mark."""
    return lambda content, mark: {
        **content,
        "extra": Call(
            function, *(value.format(mark) if isinstance(value, str) else value for value in arguments)
        ),
    }


def config(**changes):
    return lambda content, mark: content["config"].update(changes)


def nested(content, mark):
    lists = b"]" * 10**5 + b"a" * (10**5 - 1)

    def change(name, data):
        # The dictionary is what is on the pickle's stack before its last instruction.
        return name, data[:-1] + b"X\x05\0\0\0extra" + lists + b"s." if name.endswith("data.pkl") else data

    return repacked(content, change=change)


def multiplied(content, mark):
    value: list = ["x"]
    for _ in range(40):
        value = [value] * 10
    content["extra"] = value


def in_itself(content, mark):
    content["state_dict"]["extra"] = content


def expanded(content, mark):
    content["state_dict"]["extra"] = torch.zeros(1).expand(10**6, 10**6)


def deflated(content, mark):
    content["extra"] = torch.zeros(50_000_000, dtype=torch.uint8)
    return repacked(content, zipfile.ZIP_DEFLATED)


def repacked(content, compression=zipfile.ZIP_STORED, change=lambda name, data: (name, data)) -> bytes:
    whole, packed = io.BytesIO(), io.BytesIO()
    torch.save(content, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return packed.getvalue()


def renamed(content, mark):
    """A part of the container is to be written outside, were it unpacked."""
    return repacked(content, change=lambda name, data: (name.replace("/data/0", f"/../../{mark}"), data))


def twice(content, mark):
    """Two parts have one name."""
    whole = io.BytesIO(repacked(content))
    with zipfile.ZipFile(whole, "a") as container:
        name = container.namelist()[1]
        container.writestr(name, b"other")
    return whole.getvalue()


def huge_claim(content, mark):
    """A storage claims 2**40 numbers."""

    def change(name, data):
        if name.endswith("data.pkl"):
            # After its device, the first storage's size is a number of one byte.
            number = b"\x8a\x06" + struct.pack("<q", 2**40)[:6]
            data, changed = re.subn(
                rb"(cpuq.)K.", lambda found: found[1] + number, data, count=1, flags=re.DOTALL
            )
            assert changed
        return name, data

    return repacked(content, change=change)


def with_line_breaks(content, mark):
    content["state_dict"]["a\nb\x1b]0;x\x07"] = torch.ones(1)


TOO_MUCH = [
    ("20,000 layers", {"encoder_num_layers": 20_000, "encoder_use_attention": [True] * 20_000}),
    ("10**6 conv layers", {"extractor_conv_layer_config": [(16, 3, 2)] * 10**6}),
    ("10**12 features", {"encoder_embed_dim": 10**12}),
    ("10**12 parameters", {"encoder_embed_dim": 65_536, "encoder_ff_interm_features": [65_536] * 3}),
    ("a layer's list a million times", {"encoder_use_attention": [True] * 10**6}),
    (
        "60,000 heads in each of 100,000 layers",
        {
            "encoder_remaining_heads": [list(range(60_000))] * 10**5,
            "encoder_total_num_heads": [1] * 3,
            "encoder_num_buckets": 32,
            "encoder_max_distance": 64,
            "encoder_num_heads": None,
            "encoder_head_dim": None,
        },
    ),
    ("a stride of 0", {"extractor_conv_layer_config": [(16, 3, 0)]}),
    ("a kernel of 65,536", {"extractor_conv_layer_config": [(16, 65_536, 1)] * 7}),
    ("no layer", {"encoder_num_layers": 0}),
]


def folder(change=lambda config: None, text=None, options=None, **files):
    """Converts a folder of Hugging Face's format whose files are changed."""

    def do(world):
        from tests.helpers.convert import hf_model

        hf = world.tmp / "hf"
        hf_model("hubert").save_pretrained(hf)
        content = json.loads((hf / "config.json").read_text())
        change(content)
        (hf / "config.json").write_text(json.dumps(content) if text is None else text)
        if options is not None:
            (hf / "preprocessor_config.json").write_text(options)
        for name, content in files.items():
            (hf / f"{name}.py").write_text(content.format(mark=world.tmp / "ran"))
        arguments = ["--model", hf, "--out", world.tmp / "new.pth"]
        outcome = quickly(lambda: world.call("convert_hubert_from_hf", *arguments))
        assert not (world.tmp / "ran").exists()
        return outcome

    return do


def option(**values):
    return folder(lambda content: content.update(values))


def index(name):
    """The index of the weights names a file outside the folder."""

    def do(world):
        from tests.helpers.convert import hf_model

        hf = world.tmp / "hf"
        hf_model("hubert").save_pretrained(hf)
        (hf / "model.safetensors").rename(world.tmp / "model.safetensors")
        content = {"weight_map": {"x": name.format(world.tmp)}}
        (hf / "model.safetensors.index.json").write_text(json.dumps(content))
        return world.call("convert_hubert_from_hf", "--model", hf, "--out", world.tmp / "new.pth")

    return do


def fairseq(plant):
    """Converts a checkpoint of fairseq's layout that has something planted."""

    def do(world):
        from tests.helpers.convert import save_changed

        path, mark = world.tmp / "evil.pt", world.tmp / "ran"
        save_changed(path, "fairseq_hubert_base", lambda content: plant(content, mark))
        arguments = ["--ckpt", path, "--out", world.tmp / "new.pth"]
        outcome = quickly(lambda: world.call("convert_hubert_from_fairseq", *arguments))
        assert not mark.exists()
        return outcome

    return do


def fairseq_call(function, *arguments):
    def plant(content, mark):
        given = (value.format(mark) if isinstance(value, str) else value for value in arguments)
        content["extra"] = Call(function, *given)

    return plant


CODE = "open('{mark}', 'w')\n"
AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
CALLS = [
    ("os.system", os.system, "touch {}"),
    ("builtins.eval", eval, "open('{}', 'w')"),
    ("builtins.exec", exec, "open('{}', 'w')"),
    ("builtins.open", builtins.open, "{}", "w"),
    ("builtins.getattr", getattr, "{}", "touch"),
    ("pathlib.Path", Path, "{}"),
    ("torch.load", torch.load, "{}"),
    ("torch.save", torch.save, 1, "{}"),
    ("sys.exit", sys.exit, 0),
]


def mutated(read, good):
    """Random changes to a file: each is one sentence, or it is read as it was."""

    def do(world):
        from utils.files import UserError

        content, generator = good(world).read_bytes(), random.Random(SEED)
        path = world.tmp / "file.pth"
        for _ in range(MUTATIONS):
            changed = bytearray(content)
            for _ in range(generator.choice([1, 1, 3, 20])):
                start = generator.choice([0, max(0, len(changed) - 5_000)])
                changed[generator.randrange(start, len(changed))] = generator.randrange(256)
            if generator.random() < 0.2:
                del changed[generator.randrange(len(changed)) :]
            path.write_bytes(changed)
            try:
                read(path)
            except UserError as error:
                assert "\n" not in str(error) and "weights_only" not in str(error)
        return Outcome(0, "")

    return do


def read_model(path):
    from utils.checkpoint import load_model

    load_model(path)


def read_fairseq(path):
    from converters.fairseq import load_fairseq

    load_fairseq(str(path), "hubert")


def read_run_json(path):
    from utils.run_record import read_run

    path.rename(path.with_name("run.json"))
    read_run(path.parent)


PLAIN = "something other than plain values and tensors"

CASES = [
    *(Case(f"a call of {name}", hostile(calls(f, *rest)), refused(PLAIN)) for name, f, *rest in CALLS),
    *(
        Case(f"a call of {name} for fairseq's converter", fairseq(fairseq_call(f, *rest)), refused("refused"))
        for name, f, *rest in CALLS
        if name != "pathlib.Path"
    ),
    *(Case(name, hostile(config(**changes)), refused("hostile.pth: ")) for name, changes in TOO_MUCH),
    Case("content nested 100,000 deep", hostile(nested), finished("loaded by transformers")),
    Case("content that is itself 10**40 times", hostile(multiplied), finished("loaded by transformers")),
    Case("content that holds itself", hostile(in_itself), refused("extra in its state dict is no tensor")),
    Case(
        "a tensor larger than its storage", hostile(expanded), refused("the tensor extra is not a plain one")
    ),
    Case("deflated parts", hostile(deflated), refused("its parts are compressed")),
    Case(
        "a part with a path out of the container", hostile(renamed), refused("not a checkpoint, or a damaged")
    ),
    Case("two parts of one name", hostile(twice), refused("damaged")),
    Case("a storage that claims 2**40 numbers", hostile(huge_claim), refused("hostile.pth: ")),
    Case(
        "a name that would move the terminal's cursor",
        hostile(with_line_breaks),
        refused(r"a\nb\x1b]0;x\x07"),
    ),
    Case("code in a folder", folder(evil=CODE, modeling_hubert=CODE), finished("parameters")),
    Case(
        "code that a folder asks for",
        folder(lambda c: c.update(auto_map=AUTO_MAP), evil=CODE),
        finished("param"),
    ),
    Case(
        "conv_stride 0", option(conv_stride=[0] * 7), refused("(conv_dim, conv_kernel, conv_stride) is [(16")
    ),
    Case(
        "conv_stride 0 in the last layer",
        option(conv_stride=[5, 2, 2, 2, 2, 2, 0]),
        refused("conv_stride) is"),
    ),
    Case("conv_stride -1", option(conv_stride=[-1] * 7), refused("conv_stride) is")),
    Case("conv_stride of 10**30", option(conv_stride=[10**30] * 7), refused("conv_stride) is")),
    Case(
        "conv_stride of another length",
        option(conv_stride=[5, 2]),
        refused("transformers refuses its config"),
    ),
    Case("conv_dim that is a number", option(conv_dim=5), refused("transformers refuses its config")),
    Case("10**6 conv layers in a folder", option(conv_dim=[16] * 10**6), refused("has 1,000,000 entries")),
    Case(
        "20,000 layers in a folder",
        option(num_hidden_layers=20_000),
        refused("num_hidden_layers of its config"),
    ),
    Case("10**12 features in a folder", option(hidden_size=10**12), refused("hidden_size of its config is")),
    Case("10**12 labels in a folder", option(num_labels=10**12), finished("parameters")),
    Case(
        "no heads in a folder",
        option(num_attention_heads=0),
        refused("num_attention_heads of its config is 0"),
    ),
    Case("attention that is to be fetched", option(_attn_implementation="x/y"), finished("parameters")),
    Case("a config nested 100,000 deep", folder(text="[" * 10**5), refused("config.json: not a JSON file")),
    Case(
        "options nested 100,000 deep",
        folder(options='{"a":' * 10**5),
        refused("preprocessor_config.json: not"),
    ),
    Case("options that are a list", folder(options="[1]"), refused("preprocessor_config.json: holds a list")),
    Case(
        "options of another type", folder(options='{"do_normalize": "maybe"}'), refused("do_normalize of its")
    ),
    Case(
        "a number of 5,000 digits",
        folder(text='{"hidden_size":' + "9" * 5000 + "}"),
        refused("not a JSON file"),
    ),
    Case(
        "an index that leads out by ..",
        index("../model.safetensors"),
        refused("has no '../model.safetensors'"),
    ),
    Case("an index with an absolute path", index("{}/model.safetensors"), refused("has no '/")),
    Case(
        "random changes to a model's file",
        mutated(read_model, lambda world: world.teacher),
        finished(),
        slow=True,
    ),
    Case(
        "random changes to fairseq's file",
        mutated(read_fairseq, lambda world: ROOT / "tests" / "golden" / "fairseq_hubert_base.pt"),
        finished(),
        slow=True,
    ),
    Case(
        "random changes to run.json",
        mutated(read_run_json, lambda world: world.stages / "run.json"),
        finished(),
        slow=True,
    ),
]
