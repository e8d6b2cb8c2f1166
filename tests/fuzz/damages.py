"""What is done to a folder of good input before it is read: one function for each kind, returning it in words."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
from pathlib import Path

import yaml

from avatarl.run_dir.checkpoint import describe, manifest_text

from .harness import EXPLOITED
from .mutations import HOSTILE_TEXTS, PICKLE, damaged_bytes, damaged_json, damaged_tree, hostile_value, nested


def damage_a_file(folder: Path, rng: random.Random) -> str:
    """One file damaged by its kind, or something that is no file in its place."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if rng.random() < 0.08:
        return f"{path.name}: {replace_entry(path, rng)}"
    damage = damaged_json if path.suffix == ".json" else damaged_bytes
    path.write_bytes(damage(path.read_bytes(), rng))
    return path.name


def replace_entry(path: Path, rng: random.Random) -> str:
    """Put something else where a file is; returns what."""
    path.unlink()
    match rng.choice(("nothing", "folder", "pipe", "endless device", "link to itself", "dangling link", "link out")):
        case "folder":
            path.mkdir()
            return "folder"
        case "pipe":
            os.mkfifo(path)
            return "pipe"
        case "endless device":
            path.symlink_to("/dev/zero")
            return "endless device"
        case "link to itself":
            path.symlink_to(path.name)
            return "link to itself"
        case "dangling link":
            path.symlink_to("nowhere")
            return "dangling link"
        case "link out":
            path.symlink_to("/proc/self/status")
            return "link out"
    return "nothing"


def add_code(folder: Path, rng: random.Random) -> str:
    """Python, pickles and configurations that name them, beside the good files."""
    (folder / "code.py").write_text(f"import os\nos.system('touch {EXPLOITED}')\n")
    for name in ("pytorch_model.bin", "adapter_model.bin", "vocab.pkl", "training_args.bin", ".metadata"):
        (folder / name).write_bytes(PICKLE)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"import os\nos.system('touch {EXPLOITED}')\n")
    path = folder / rng.choice(("config.json", "tokenizer_config.json", "generation_config.json"))
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    added = rng.choice(
        (
            {"auto_map": {name: "code.Class" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}},
            {"auto_map": {"AutoTokenizer": ["code.Class", "code.Class"]}, "tokenizer_class": "Class"},
            {"auto_map": ["code.Class", None], "model_type": "unknown"},
            {"transformers_weights": "adapter_model.bin"},
            {"transformers_weights": "pytorch_model.bin"},
            {"attn_implementation": "organisation/kernel"},
            {"_attn_implementation": "organisation/kernel"},
            {"quantization_config": {"quant_method": rng.choice(("bitsandbytes", "gptq", "awq", "fp8"))}},
            {"custom_generate": "code.py"},
            {
                "tokenizer_class": rng.choice(
                    ("RagTokenizer", "BertJapaneseTokenizer", "MistralCommonBackend", "object")
                )
            },
            {"model_type": rng.choice(("rag", "t5", "bert", "mamba", "whisper", "unknown"))},
            {"vocab_file": "/dev/zero", "merges_file": "/dev/zero", "tokenizer_file": "/dev/zero"},
        )
    )
    path.write_text(json.dumps(settings | added), encoding="utf-8")
    return f"{path.name} with {added}"


# --- prepared folders -----------------------------------------------------------------------------------------------


def damage_prepared(folder: Path, rng: random.Random) -> str:
    manifest_path = folder / "manifest.json"
    if rng.random() < 0.4:
        manifest_path.write_bytes(damaged_json(manifest_path.read_bytes(), rng))
        return "manifest"
    if rng.random() < 0.1:
        manifest = json.loads(manifest_path.read_text())
        name = rng.choice((*HOSTILE_TEXTS, f"train-{'0' * rng.choice((1, 5, 300))}.bin", "train-a\x1b[m.bin", "."))
        manifest["files"][name] = rng.choice(list(manifest["files"].values()))
        manifest_path.write_text(json.dumps(manifest))
        return f"file named {name[:50]!r}"
    names = [name for name in json.loads(manifest_path.read_text())["files"]]
    path = folder / rng.choice(names)
    what = damage_a_file(folder, rng) if rng.random() < 0.2 else damage_one(path, rng)
    if rng.random() < 0.8:
        sign_again(folder)
        what += ", with a matching manifest"
    return what


def damage_cache(folder: Path, rng: random.Random) -> str:
    """The manifest, or a file of a cache, which a forger then signs again."""
    manifest_path = folder / "cache.json"
    if rng.random() < 0.5:
        manifest_path.write_bytes(damaged_json(manifest_path.read_bytes(), rng))
        if rng.random() < 0.2:
            manifest_path.rename(folder / "cache.partial.json")
        return "manifest"
    names = list(json.loads(manifest_path.read_text())["files"])
    what = damage_a_file(folder, rng) if rng.random() < 0.2 else damage_one(folder / rng.choice(names), rng)
    if rng.random() < 0.8 and manifest_path.is_file() and not manifest_path.is_symlink():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            manifest = json.loads(manifest_path.read_bytes())
            for name in names:
                if (folder / name).is_file() and not (folder / name).is_symlink():
                    manifest["files"][name] = describe(folder / name)
            manifest_path.write_text(json.dumps(manifest))
            what += ", with a matching manifest"
    return what


def damage_one(path: Path, rng: random.Random) -> str:
    damage = damaged_json if path.suffix == ".json" else damaged_bytes
    path.write_bytes(damage(path.read_bytes(), rng))
    return path.name


def sign_again(folder: Path) -> None:
    """A forger's manifest: sizes, sums and numbers of tokens as the files have them."""
    path = folder / "manifest.json"
    if not path.is_file() or path.is_symlink():
        return
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        manifest = json.loads(path.read_bytes())
        tokens = {"train": 0, "valid": 0}
        for name in manifest["files"]:
            if (folder / name).is_file() and (folder / name).stat().st_size:
                content = (folder / name).read_bytes()
                manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                if name.endswith(".bin"):
                    tokens[name.partition("-")[0]] += len(content) // 2
        manifest["tokens"] = tokens
        path.write_text(json.dumps(manifest))


# --- run folders ----------------------------------------------------------------------------------------------------


def damage_run(folder: Path, rng: random.Random) -> str:
    """What a run says of itself, or its checkpoint, half of the time with a manifest that a forger has signed."""
    if rng.random() < 0.4:
        return damage_one(folder / rng.choice(("config.yaml", "environment.json")), rng)
    (checkpoint,) = folder.glob("checkpoints/step-*")
    if rng.random() < 0.2:
        return damage_a_file(checkpoint, rng)
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    if rng.random() < 0.5:
        name = rng.choice(("state.json", "player.safetensors", "optimiser.safetensors"))
        what = damage_one(checkpoint / name, rng)
        manifest["files"][name] = describe(checkpoint / name)
    else:
        what, manifest = "manifest", damaged_tree(manifest, rng)
    with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError, RecursionError):
        path.write_text(manifest_text(manifest["step"], manifest["files"], manifest["identity"]))
        what += ", signed"
    return what


# --- tokenizers and models ------------------------------------------------------------------------------------------


def damage_tokenizer(folder: Path, rng: random.Random) -> str:
    return add_code(folder, rng) if rng.random() < 0.1 else damage_a_file(folder, rng)


def write_setting(folder: Path, rng: random.Random) -> str:
    spec = rng.choice(("bpe:", "bpe:", "./", "/", "~", "bpe:-")) + str(hostile_value(rng))[:10_000]
    (folder / "setting").write_bytes(spec.encode("utf-8", "surrogatepass"))
    return spec[:50]


def damage_model(folder: Path, rng: random.Random) -> str:
    chance = rng.random()
    if chance < 0.15:
        return add_code(folder, rng)
    if chance < 0.5:
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        key = rng.choice(sorted(settings))
        settings[key] = rng.choice((hostile_value(rng), 10 ** rng.randrange(12), -(10 ** rng.randrange(12)), 2, 17))
        path.write_text(json.dumps(settings))
        return f"config.json, {key} = {str(settings[key])[:50]}"
    weights = rng.choice(sorted(folder.glob("*.safetensors")))
    if chance < 0.6:
        header_bytes = int.from_bytes(weights.read_bytes()[:8], "little")
        content = weights.read_bytes()
        header = json.dumps(damaged_tree(json.loads(content[8 : 8 + header_bytes]), rng)).encode("utf-8", "replace")
        weights.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + header_bytes :])
        return f"header of {weights.name}"
    if chance < 0.65:
        weights.rename(folder / "pytorch_model.bin")
        (folder / "pytorch_model.bin").write_bytes(PICKLE)
        index = {"metadata": {}, "weight_map": {"lm_head.weight": rng.choice(("pytorch_model.bin", "../x", "/etc/x"))}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "spare.safetensors").write_bytes(b"")
        return "an index that names a pickle"
    return damage_a_file(folder, rng)


def damage_generation(folder: Path, rng: random.Random) -> str:
    path = folder / "generation_config.json"
    if rng.random() < 0.6:
        return damage_model(folder, rng)
    settings = json.loads(path.read_text())
    for name in ("num_beams", "max_length", "stop_strings", "num_return_sequences", "penalty_alpha"):
        settings[name] = rng.choice((2, 0.5, hostile_value(rng)))
    path.write_text(json.dumps(settings))
    return "generation_config.json"


# --- metrics, sources, recipes --------------------------------------------------------------------------------------


def damage_metrics(folder: Path, rng: random.Random) -> str:
    path = folder / "metrics.jsonl"
    if rng.random() < 0.05:
        return replace_entry(path, rng)
    lines = path.read_bytes().splitlines()
    number = rng.randrange(len(lines))
    lines[number] = rng.choice((damaged_json, damaged_json, damaged_bytes))(lines[number], rng)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"line {number + 1}"


def damage_what_is_reported(folder: Path, rng: random.Random) -> str:
    """What a report reads of a run: its settings, its record or its metrics."""
    if rng.random() < 0.3:
        return f"metrics, {damage_metrics(folder, rng)}"
    name = rng.choice(("config.yaml", "environment.json"))
    path = folder / name
    if name == "config.yaml" and rng.random() < 0.5:
        path.rename(folder / "recipe.yaml")
        what = damage_recipe(folder, rng)
        (folder / "recipe.yaml").rename(path)
        return f"settings, {what}"
    return f"{name}, {replace_entry(path, rng)}" if rng.random() < 0.1 else damage_one(path, rng)


def damage_sources(folder: Path, rng: random.Random) -> str:
    """One source damaged, and its name written down for the reader; all are named at times."""
    names = ["text.jsonl", "text.txt", "text.md", "text.parquet"]
    name = rng.choice((*names, *(f"{n}.gz" for n in names if n != "text.md"), "nanogpt"))
    (folder / "chosen").write_text(name)
    path = folder / name
    if name == "nanogpt":
        path /= rng.choice(("train.bin", "val.bin"))
    if rng.random() < 0.05:
        what = replace_entry(path, rng)
    elif name == "text.jsonl":
        lines = path.read_bytes().splitlines()
        lines[2] = rng.choice((damaged_json(lines[2], rng), nested(100_000), b'{"text": 1' + b"0" * 5000 + b"}"))
        path.write_bytes(b"\n".join(lines))
        what = "a line"
    else:
        what = damage_one(path, rng)
    if rng.random() < 0.2:
        (folder / "chosen").write_text(".")
    return f"{name}: {what}"


HOSTILE_RECIPES = (
    b"critic: &a [*a]",
    b"!!python/object/apply:os.system ['touch exploited']",
    b"data: !!python/object/apply:os.system ['touch exploited']",
    b"out: !!python/name:os.system ''",
    b"player: !!python/object/new:type {}",
    b"config: recipe.yaml",
    b"steps: !!int '1" + b"0" * 5000 + b"'",
    b"<<: {steps: 3}",
    b"? [a, b]\n: c",
    b"--- 1\n--- 2",
    b"%YAML 9.9\n---\na: 1",
    b"critic: " + nested(2000),
    b"{" * 100_000,
    b"steps: 3\n" * 1000,
    b"data: 2024-01-01\nout: 12:30:45\nsteps: 0o17",
)


def damage_recipe(folder: Path, rng: random.Random) -> str:
    path = folder / "recipe.yaml"
    chance = rng.random()
    if chance < 0.15:
        number = rng.randrange(len(HOSTILE_RECIPES))
        path.write_bytes(HOSTILE_RECIPES[number])
        return f"hostile recipe {number}"
    if chance < 0.7:
        tree = damaged_tree(yaml.safe_load(path.read_text()), rng)
        with contextlib.suppress(Exception):  # what YAML cannot write is damaged in its bytes
            path.write_bytes(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass"))
            return "a setting"
    path.write_bytes(damaged_bytes(path.read_bytes(), rng))
    return "bytes"
