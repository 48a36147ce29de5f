import dataclasses
import json

import pytest
import torch
from truth.word_tokenizer import word_tokenizer_files

from raphael.base.config.params import NO_TEXT, load_config
from raphael.encoders.clip import build_clip, save_clip
from raphael.encoders.image import load_clip
from raphael.encoders.pretrained import PretrainedError, write_pointer
from raphael.encoders.text import END, PAD, START, load_text_encoder, up_to_first

PROMPTS = ["a red circle left of a blue square", ""]


@pytest.fixture(scope="module")
def clip_folder(project, tmp_path_factory):
    config = load_config(project / "params.yaml").clip
    config = dataclasses.replace(config, text_width=32, text_layers=1, image_width=32, image_layers=1, embed_dim=24)
    torch.manual_seed(0)
    clip = build_clip(config)
    torch.nn.init.normal_(clip.model.token_embedding.weight)
    folder = tmp_path_factory.mktemp("clip")
    save_clip(clip, folder)
    clip.model.eval()
    return folder, clip


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    vocabulary = word_tokenizer_files(folder, PROMPTS[0].split(), ["<pad>", "</s>", "<unk>"], pad_token="<pad>")
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf_clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("hf_clip")
    special = ["<s>", "</s>", "<unk>"]  # as with CLIP ViT-L/14, padding is the closing token again
    vocabulary = word_tokenizer_files(
        folder, PROMPTS[0].split(), special, pad_token="</s>", bos_token="<s>", model_max_length=12
    )
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **size, "vocab_size": len(vocabulary), "max_position_embeddings": 12,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16}, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_the_open_clip_tower_gives_the_pooled_vector_of_open_clip_itself(clip_folder):
    folder, clip = clip_folder
    encoder = load_text_encoder(folder)
    ids = encoder.tokenize(PROMPTS)
    assert ids.shape == (2, 32) and ids.dtype == torch.int64
    context, mask, pooled = encoder.encode(ids)
    assert context.shape == (2, 32, 32) and encoder.dim == 32 and pooled.shape == (2, 24)
    torch.testing.assert_close(pooled, clip.model.encode_text(ids), atol=1e-5, rtol=1e-5)
    assert mask.sum(dim=1).tolist() == [10, 2]


def test_ids_of_any_integer_type_do(clip_folder):
    encoder = load_text_encoder(clip_folder[0])
    ids = encoder.tokenize(PROMPTS)
    assert torch.equal(encoder.encode(ids.int()).context, encoder.encode(ids).context)


def test_real_tokens_do_not_see_what_follows_them(clip_folder):
    encoder = load_text_encoder(clip_folder[0])
    short, long = encoder.encode(encoder.tokenize(["a red", "a red circle"])).context
    torch.testing.assert_close(short[:3], long[:3])


def test_tokens_of_names_the_piece_at_each_position(clip_folder):
    tokens = load_text_encoder(clip_folder[0]).tokens_of("a red circle")
    assert tokens == [START, "a", "red", "circle", END] + [PAD] * 27


def test_a_text_that_is_too_long_keeps_its_closing_token(clip_folder):
    encoder = load_text_encoder(clip_folder[0])
    ids = encoder.tokenize(["red " * 100])
    assert ids[0, -1] == encoder.tokenizer.eot_token_id and bool(encoder.encode(ids).mask.all())


def test_an_id_of_padding_that_is_also_a_word_is_real_before_the_end():
    ids = torch.tensor([[5, 0, 9, 0, 0], [5, 9, 9, 9, 9]])  # 0: "!" and padding; 9: closing token and padding
    assert up_to_first(ids, 9).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]


def test_a_t5_encoder_gives_what_transformers_gives(t5_folder):
    from transformers import T5EncoderModel

    encoder = load_text_encoder(f"t5:{t5_folder}", context_length=12)
    ids = encoder.tokenize(PROMPTS)
    context, mask, pooled = encoder.encode(ids)
    assert context.shape == (2, 12, 16) and mask.sum(dim=1).tolist() == [9, 1]
    alone = T5EncoderModel.from_pretrained(t5_folder)(input_ids=ids[:1, :9]).last_hidden_state
    torch.testing.assert_close(context[:1, :9], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled[0], alone[0].mean(dim=0), atol=1e-5, rtol=1e-5)
    assert encoder.tokens_of("a red circle")[:5] == ["a", "red", "circle", END, PAD]
    assert load_text_encoder(f"t5:{t5_folder}").context_length == 77


@pytest.mark.parametrize("kind", ["own", "clip", "t5"])
def test_a_sentence_of_a_texts_own_pieces_is_what_tokenize_makes_of_it(kind, clip_folder, hf_clip_folder, t5_folder):
    spec = {"own": clip_folder[0], "clip": f"clip:{hf_clip_folder}", "t5": f"t5:{t5_folder}"}[kind]
    encoder = load_text_encoder(spec, context_length=12 if kind == "t5" else None)
    for text in ("a red circle", "", "a red circle " * 40):
        pieces = encoder.pieces(text)
        assert torch.equal(encoder.sentence(pieces[: encoder.room]), encoder.tokenize([text])[0])
    assert encoder.text_of(encoder.pieces("a red circle")).split() == ["a", "red", "circle"]


def test_transformers_clip_gives_its_own_hidden_states_and_pooled_vector(hf_clip_folder):
    from transformers import CLIPTextModel

    encoder = load_text_encoder(f"clip:{hf_clip_folder}")
    assert encoder.context_length == 12 and encoder.dim == 16
    ids = encoder.tokenize(PROMPTS)
    context, mask, pooled = encoder.encode(ids)
    truth = CLIPTextModel.from_pretrained(hf_clip_folder)(input_ids=ids)
    torch.testing.assert_close(context, truth.last_hidden_state)
    torch.testing.assert_close(pooled, truth.pooler_output)
    assert mask.sum(dim=1).tolist() == [10, 2]
    assert encoder.tokens_of("a red")[:5] == [START, "a", "red", END, PAD]


def test_a_transformers_clip_scores_as_its_own_projections_do(hf_clip_folder):
    from transformers import CLIPModel

    scorer = load_clip(f"clip:{hf_clip_folder}")
    texts = scorer.embed_texts(PROMPTS)
    model = CLIPModel.from_pretrained(hf_clip_folder)
    truth = model(input_ids=scorer.tokenize(PROMPTS), pixel_values=torch.zeros(1, 3, 32, 32)).text_embeds
    torch.testing.assert_close(texts, truth)


def test_open_clip_loads_by_architecture_and_weights_file(tmp_path, monkeypatch):
    import open_clip

    settings = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
                "text_cfg": {"context_length": 10, "width": 32, "heads": 2, "layers": 1}}  # fmt: skip
    (tmp_path / "test-tiny.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.create_model("test-tiny").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    spec = f"open_clip:test-tiny:{tmp_path / 'weights.pt'}"
    encoder = load_text_encoder(spec)
    ids = encoder.tokenize(PROMPTS)
    assert ids.shape == (2, 10)
    torch.testing.assert_close(encoder.encode(ids).pooled, model.encode_text(ids), atol=1e-5, rtol=1e-5)
    truth = torch.nn.functional.normalize(model.encode_text(ids), dim=-1)
    torch.testing.assert_close(load_clip(spec).embed_texts(PROMPTS), truth, atol=1e-5, rtol=1e-5)


def test_a_pointer_folder_stands_for_a_spec_with_its_context_length(t5_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RAPHAEL_ALLOW_REMOTE", "1")
    write_pointer(tmp_path, f"t5:{t5_folder}", {"context_length": 9})
    assert load_text_encoder(tmp_path).context_length == 9


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("t5:nobody/no-such-t5", "hf download nobody/no-such-t5"),
        ("clip:./nowhere", "no folder here"),
        ("open_clip:no-such-arch:x", "unknown architecture"),
        ("open_clip:ViT-B-32:no-such-tag", "expected a weights file, or one of"),
        ("models/absent", "expected a folder like models/clip"),
    ],
)
def test_what_is_not_there_is_one_line_that_says_what_to_do(spec, part, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PretrainedError, match=part) as caught:
        load_text_encoder(spec)
    assert "\n" not in str(caught.value)


def test_ids_of_another_length_and_damaged_weights_are_refused(clip_folder, tmp_path):
    folder, clip = clip_folder
    with pytest.raises(ValueError, match=r"expected \(B, 32\)"):
        load_text_encoder(folder).encode(torch.zeros(1, 7, dtype=torch.long))
    save_clip(clip, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(PretrainedError, match="damaged"):
        load_text_encoder(tmp_path)


def test_a_workspace_without_a_text_encoder_says_so_to_whoever_asks_for_one(tmp_path):
    write_pointer(tmp_path, NO_TEXT, {})
    with pytest.raises(PretrainedError, match="got none, as clip.pretrained says; name one there and run clip again"):
        load_text_encoder(tmp_path)
