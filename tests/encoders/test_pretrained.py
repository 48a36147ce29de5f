"""A model's folder may be a stranger's: where its pointers may lead, and that no code in it is run."""

import argparse
import contextlib
import json
import pickle
import time

import pytest
import torch
from truth.tiny_raphael import write_pipeline
from truth.word_tokenizer import word_tokenizer_files

from raphael.base.config import consent
from raphael.base.config.params import load_config
from raphael.base.strict import load as load_settings
from raphael.base.strict import read_yaml
from raphael.encoders import image, pretrained, text
from raphael.encoders.autoencoder import load_autoencoder
from raphael.encoders.pretrained import PretrainedError, follow, write_pointer
from raphael.generate.pipeline import RaphaelPipeline
from raphael.systems.exchange.export import export
from raphael.systems.exchange.import_model import import_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_word(monkeypatch):
    monkeypatch.delenv(consent.ALLOW_REMOTE, raising=False)
    monkeypatch.delenv(consent.OF_SETTINGS, raising=False)


@pytest.fixture
def places(tmp_path):
    """A folder with a pointer, parts below it, a part beside it, and links that lead out."""
    for name in ("model/text/tower", "model/parts", "beside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "model/text/out").symlink_to(tmp_path / "beside")
    for name in ("good.safetensors", "bad.pt", "worse.bin"):
        (tmp_path / "model/text" / name).touch()
    return tmp_path


def judged(places, spec: str) -> str:
    folder = places / "model" / "text"
    write_pointer(folder, spec.replace("{places}", str(places)), {})
    try:
        return follow(folder)
    except PretrainedError as error:
        assert "\n" not in str(error) and "pointer.json" in str(error)
        return "refused" if "--allow-remote" in str(error) else "not pinned" if "<commit>" in str(error) else "pickle"


@pytest.mark.parametrize(
    ("spec", "without", "allowed"),
    [
        ("none", "taken", "taken"),
        ("pixels", "taken", "taken"),
        ("clip:{here}/tower", "taken", "taken"),
        ("t5:{here}", "taken", "taken"),
        ("{here}/tower", "taken", "taken"),
        ("open_clip:ViT-B-32:{here}/good.safetensors", "taken", "taken"),
        ("open_clip:ViT-B-32:{here}/bad.pt", "pickle", "pickle"),
        ("open_clip:ViT-B-32:{here}/worse.bin", "pickle", "pickle"),
        ("clip:{here}/../parts", "refused", "taken"),
        ("clip:{here}/out", "refused", "taken"),
        ("clip:{places}/beside", "refused", "taken"),
        ("clip:{places}/beside:{here}/tower", "refused", "taken"),
        ("{places}/beside", "refused", "taken"),
        ("/nowhere/at/all", "refused", "taken"),
        ("//server/share/weights", "refused", "taken"),
        ("~/weights", "refused", "taken"),
        ("clip:nobody/tower", "refused", "not pinned"),
        ("clip:nobody/tower@main", "refused", "not pinned"),
        ("t5:nobody/tower@" + COMMIT[:7], "refused", "not pinned"),
        ("nobody/autoencoder", "refused", "not pinned"),
        ("nobody/autoencoder@" + COMMIT, "refused", "taken"),
        ("clip:nobody/tower@" + COMMIT, "refused", "taken"),
        ("open_clip:ViT-L-14:openai", "refused", "taken"),
        ("open_clip:hf-hub:nobody/tower", "refused", "taken"),  # no architecture of open_clip's list: not loaded either
    ],
)
def test_a_pointer_stays_below_its_folder_without_a_word_and_on_a_pinned_commit_with_it(
    places, spec, without, allowed, monkeypatch
):
    outcome = judged(places, spec)
    assert (outcome if outcome in ("refused", "not pinned", "pickle") else "taken") == without
    monkeypatch.setenv(consent.ALLOW_REMOTE, "1")
    outcome = judged(places, spec)
    assert (outcome if outcome in ("refused", "not pinned", "pickle") else "taken") == allowed


def test_what_the_settings_name_may_be_pointed_at_and_nothing_else(places, project, monkeypatch):
    monkeypatch.setenv(consent.OF_SETTINGS, "[]")  # so that it is put back
    config = load_config(project / "params.yaml")
    named = {"clip": "clip:somebody/tower", "autoencoder": str(places / "beside")}
    sections = {name: {**read_yaml(project / "params.yaml")[name], "pretrained": spec} for name, spec in named.items()}
    parts = {name: load_settings(type(getattr(config, name)), section, "x", name) for name, section in sections.items()}
    consent.trust_settings(config.__class__(**{**vars(config), **parts}))
    taken = {"clip:somebody/tower", f"clip:somebody/tower@{COMMIT}", str(places / "beside")}
    assert {judged(places, spec) for spec in taken} == taken
    for spec in ("clip:somebody/tower@main", "t5:somebody/tower", "clip:somebody/tower2", str(places / "beside2")):
        assert judged(places, spec) == "refused"


def test_the_option_gives_the_word_when_it_is_read_and_only_then(places, monkeypatch):
    monkeypatch.setenv(consent.ALLOW_REMOTE, "")
    parser = argparse.ArgumentParser()
    consent.add_option(parser)
    parser.parse_args([])
    assert judged(places, "clip:{places}/beside") == "refused"
    parser.parse_args(["--allow-remote"])
    assert judged(places, "clip:{places}/beside") != "refused"


@pytest.mark.parametrize("load", [lambda: text.load_text_encoder(SPEC), lambda: image.load_clip(SPEC)])
def test_the_hub_is_asked_for_the_pinned_commit_and_never_for_code(load, monkeypatch):
    asked = []

    def record(*names, **options):
        asked.append((names, options))
        raise OSError("no network here")

    for name in ("AutoTokenizer", "CLIPTextModel", "CLIPModel"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", record)
    with pytest.raises(PretrainedError, match="nobody/tower"):
        load()
    ((names, options),) = asked
    assert names == ("nobody/tower",)
    assert options == {"local_files_only": False, "revision": COMMIT, "trust_remote_code": False}


SPEC = f"clip:nobody/tower@{COMMIT}"


def test_the_autoencoder_of_the_hub_is_asked_for_at_its_commit(monkeypatch):
    asked = []

    def record(name, **options):
        asked.append((name, options["revision"], options["use_safetensors"]))
        raise OSError("no network here")

    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", record)
    with pytest.raises(PretrainedError, match="nobody/autoencoder"):
        load_autoencoder(f"nobody/autoencoder@{COMMIT}")
    assert asked == [("nobody/autoencoder", COMMIT, True)]


def test_a_spec_is_pinned_once_and_a_folder_never():
    assert pretrained.pinned("clip:a/b", COMMIT) == f"clip:a/b@{COMMIT}" == pretrained.pinned(f"clip:a/b@{COMMIT}", "x")
    assert pretrained.pinned("clip:/a/b", None) == "clip:/a/b"
    assert pretrained.split_revision(f"a/b@{COMMIT}") == ("a/b", COMMIT)
    assert pretrained.split_revision("a/b@main") == ("a/b@main", None)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_code_in_a_folder_of_weights_is_neither_run_nor_asked_about(kind, tmp_path, monkeypatch):
    """The control: the same folder, trusted, runs it."""
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    words = word_tokenizer_files(tmp_path, ["red"], ["<pad>", "</s>", "<unk>"], pad_token="<pad>")
    if kind == "t5":
        size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        T5EncoderModel(T5Config(vocab_size=len(words), **size)).save_pretrained(tmp_path)
    else:
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=9, **size)
        CLIPTextModel(config).save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "theirs.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own"
    )
    for name, classes in (
        ("config.json", {"AutoModel": "theirs.Own", "AutoConfig": "theirs.Own", "AutoTokenizer": ["theirs.Own", None]}),
        ("tokenizer_config.json", {"AutoTokenizer": ["theirs.Own", "theirs.Own"]}),
    ):
        settings = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**settings, "tokenizer_class": "Own", "auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    # where their code is run, at the end, every tokenizer would be one of theirs from then on
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast._auto_class", None)
    try:
        text.load_text_encoder(f"{kind}:{tmp_path}")
    except PretrainedError as error:
        assert "\n" not in str(error)
    assert not ran.exists()
    with contextlib.suppress(AttributeError):  # what they call a config is none
        AutoTokenizer.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=True)
    assert ran.exists()


def test_a_strangers_pointers_are_refused_on_import_and_on_loading(tmp_path, monkeypatch):
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    model = write_pipeline(tmp_path / "model")
    whole = export(model, tmp_path / "out", "safetensors")
    with safe_open(whole, "pt") as stored:
        tensors, header = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118
    files = {**json.loads(header["files"]), "text_encoder/pointer.json": json.dumps({"spec": "clip:nobody/tower"})}
    save_file(tensors, tmp_path / "evil.safetensors", metadata={**header, "files": json.dumps(files)})
    with pytest.raises(PretrainedError, match="leads to the hub, 'clip:nobody/tower': refused"):
        import_model(tmp_path / "evil.safetensors", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()
    write_pointer(model / "text_encoder", f"clip:{tmp_path}/elsewhere", {})
    with pytest.raises(PretrainedError, match="leads to a place outside this folder"):
        RaphaelPipeline.from_pretrained(model)
    monkeypatch.setenv(consent.ALLOW_REMOTE, "1")
    with pytest.raises(PretrainedError, match="elsewhere.*which is no folder here"):
        RaphaelPipeline.from_pretrained(model)


@pytest.mark.parametrize("name", ["evil.pt", "evil.bin", "half.pt", "words.pt", "half.safetensors"])
def test_a_pickle_given_to_open_clip_is_one_line_and_is_not_run(name, tmp_path):
    """The control: unpickled, it leaves a file."""
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return open, (str(ran), "w")

    if name.startswith("evil"):
        torch.save({"state_dict": Evil()}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps({"a": 1})[:-2] if name.startswith("half") else b"no weights")
    with pytest.raises(PretrainedError) as caught:
        text.load_text_encoder(f"open_clip:RN50:{tmp_path / name}")
    assert (
        "\n" not in str(caught.value) and str(caught.value).startswith("open_clip: ") and len(str(caught.value)) < 600
    )
    assert not ran.exists()
    if name.startswith("evil"):
        torch.load(tmp_path / name, weights_only=False)
        assert ran.exists()


def test_a_text_of_100_mb_is_tokenized_as_its_beginning(monkeypatch):
    from raphael.encoders.clip import MAX_CHARS, OpenClip, _tokenizer

    clip = OpenClip(torch.nn.Module(), _tokenizer(), 16, 32)
    long = "a red circle on a blue square " * 4_000_000
    began = time.process_time()
    (ids,) = clip.tokenize([long])
    assert time.process_time() - began < 5
    assert torch.equal(ids, clip.tokenize([long[:300]])[0]) and len(long) > 1000 * MAX_CHARS
