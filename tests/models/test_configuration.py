import pytest
from transformers import AutoConfig, SegformerConfig

from t2sda_hf.config import load_config
from t2sda_hf.models import T2SDAConfig
from t2sda_hf.training.build import build_student


def test_defaults_are_the_papers_head_and_projector():
    config = T2SDAConfig()

    assert (config.head, config.decoder_hidden_size, config.head_dilations) == ("daformer", 256, (1, 6, 12, 18))
    assert (config.projector_dim, config.projector_hidden, config.projector_kernel) == (256, 256, 1)
    assert config.drop_path_rate == 0.1
    assert config.classifier_dropout_prob == 0.1


def test_from_size_knows_b5():
    config = T2SDAConfig.from_size("mit_b5", num_labels=19)

    assert config.depths == (3, 6, 40, 3)
    assert config.hidden_sizes == (64, 128, 320, 512)
    assert config.num_attention_heads == (1, 2, 5, 8)
    assert config.num_labels == 19


@pytest.mark.parametrize(
    ("size", "head", "channels"),
    [("mit_b5", "daformer", 256), ("mit_b5", "all_mlp", 768), ("mit_b2", "all_mlp", 768), ("mit_b1", "all_mlp", 256)],
)
def test_from_size_gives_the_head_its_usual_width(size, head, channels):
    assert T2SDAConfig.from_size(size, head=head).decoder_hidden_size == channels


@pytest.mark.parametrize(("given", "channels"), [("", 768), (", decoder_hidden_size: 12", 12)])
def test_a_run_leaves_the_width_of_its_head_to_the_size(given, channels):
    model = "size: mit_b2, head: all_mlp, pretrained: null, depths: [1, 1, 1, 1], hidden_sizes: [8, 8, 10, 8]"
    cfg = load_config(None, [f"--model={{{model}, drop_path_rate: 0{given}}}", "--loss_weights.feature_distance=0"])
    assert build_student(cfg).decode_head.classifier.in_channels == channels


def test_from_size_lets_overrides_win():
    config = T2SDAConfig.from_size("mit_b3", head="all_mlp", decoder_hidden_size=32, depths=(1, 1, 1, 1))

    assert (config.decoder_hidden_size, config.depths) == (32, (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("head", "dafomer", "head must be one of daformer, all_mlp, linear, deeplabv2; got 'dafomer'"),
        ("projector_kernel", 2, "projector_kernel must be 1 or 3; got 2"),
        ("projector_in_index", (1, 0), r"ascending order, each once; got \(1, 0\)"),
        ("projector_in_index", (0, 4), r"encoder levels \(0, 1, 2, 3\)"),
        ("projector_in_index", (0, 0), "each once"),
        ("projector_in_index", (), "one or more of the encoder levels"),
        ("head_dilations", (0, 6), r"integers from 1; got \(0, 6\)"),
        ("projector_dim", 0, "projector_dim must be from 1 to 4096; got 0"),
        ("decoder_hidden_size", 0, "decoder_hidden_size must be from 1 to 4096; got 0"),
        ("projector_hidden", 10**9, "projector_hidden must be from 1 to 4096; got 1000000000"),
        ("depths", (2, 2, 2, 10**6), r"depths must be 4 numbers from 1 to 256; got \(2, 2, 2, 1000000\)"),
        ("depths", (2, 2, 2), "depths must be 4 numbers"),
        ("hidden_sizes", (32, 0, 160, 256), "hidden_sizes must be 4 numbers from 1"),
        ("hidden_sizes", (32, 63, 160, 256), r"hidden_sizes must be multiples of num_attention_heads \(1, 2, 5, 8\)"),
        ("num_attention_heads", (1, 2, 0, 8), "num_attention_heads must be 4 numbers from 1"),
        ("id2label", dict(enumerate("x" * 10_001)), "at most 10000 classes; id2label has 10001"),
        ("id2label", {0: "road", 2: "sky"}, "every id from 0 to 1, without a gap; got 0, 2"),
        ("reshape_last_stage", False, "the heads read maps"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        T2SDAConfig(**{field: value})


def test_from_size_names_the_sizes_there_are():
    with pytest.raises(ValueError, match="mit_b0, mit_b1, mit_b2, mit_b3, mit_b4, mit_b5; got 'b5'"):
        T2SDAConfig.from_size("b5")


def test_a_saved_config_comes_back_equal(tmp_path, tiny):
    config = T2SDAConfig(**tiny, head="all_mlp", projector_in_index=(0, 3), projector_final_relu=False)
    config.save_pretrained(tmp_path)

    loaded = AutoConfig.from_pretrained(tmp_path)

    assert type(loaded) is T2SDAConfig
    assert loaded.projector_in_index == (0, 3)
    assert loaded.to_diff_dict() == T2SDAConfig.from_pretrained(tmp_path).to_diff_dict()
    assert not loaded.projector_final_relu


def test_overrides_of_from_pretrained_are_checked_too(tmp_path, tiny):
    T2SDAConfig(**tiny).save_pretrained(tmp_path)

    assert T2SDAConfig.from_pretrained(tmp_path, head="all_mlp").head == "all_mlp"
    with pytest.raises(ValueError, match="head must be one of"):
        T2SDAConfig.from_pretrained(tmp_path, head="unet")


def test_a_plain_segformer_config_keeps_its_all_mlp_head(tmp_path, tiny):
    SegformerConfig(**tiny).save_pretrained(tmp_path)

    config = T2SDAConfig.from_pretrained(tmp_path)

    assert (config.head, config.num_labels, list(config.depths)) == ("all_mlp", 5, [1, 1, 1, 1])
    assert config.model_type == "t2sda"
    assert T2SDAConfig.from_pretrained(tmp_path, head="daformer").head == "daformer"


def test_num_labels_can_be_changed_when_a_config_is_loaded(tmp_path):
    SegformerConfig(id2label={0: "cat", 1: "dog", 2: "cow"}).save_pretrained(tmp_path)

    assert T2SDAConfig.from_pretrained(tmp_path).id2label == {0: "cat", 1: "dog", 2: "cow"}
    assert T2SDAConfig.from_pretrained(tmp_path, num_labels=7).num_labels == 7
