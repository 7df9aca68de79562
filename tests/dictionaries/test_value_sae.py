import torch
from torch.testing import assert_close

from crosshead.dictionaries.base import LayerWeights, ModelDims, Site
from crosshead.dictionaries.registry import build, config_class
from tests.dictionaries.test_contract import started

# Six query heads share two key/value heads: head h reads key/value head h // 3.
GROUPED = ModelDims(d_model=8, n_heads=6, n_kv_heads=2, head_dim=3, n_layers=5)


def grouped_module(norm: str = "sum_of_layers"):
    config = config_class("value_sae").model_validate(
        {"kind": "value_sae", "layers": [1, 4], "features": 7, "norm": norm, "sparsity": {"kind": "topk", "k": 2}}
    )
    module = build(config, GROUPED)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module.decoder.copy_(torch.randn(module.decoder.shape, generator=generator))
        module.scales.copy_(torch.tensor([0.5, 4.0]))
    weights = {layer: LayerWeights(torch.randn(6, 3, 8, generator=generator), torch.zeros(8)) for layer in (1, 4)}
    return module, weights


def test_query_head_loadings_are_what_a_unit_feature_writes_through_each_head():
    module, weights = grouped_module()
    expected = torch.zeros(7, 12)
    for feature in range(7):
        for i, layer in enumerate((1, 4)):
            for h in range(6):
                first = i * 6 + (h // 3) * 3
                value = module.decoder[feature, first : first + 3] / module.scales[i]
                expected[feature, i * 6 + h] = (value @ weights[layer].W_O[h]).norm()
    assert_close(module.query_head_loadings(weights), expected)


def test_query_head_loadings_of_a_folded_copy_are_equal():
    module, weights = grouped_module()
    module.scales.fill_(0.5)
    assert_close(module.folded().query_head_loadings(weights), module.query_head_loadings(weights))


def test_head_loadings_are_decoder_norms_per_key_value_head():
    module, _ = grouped_module()
    loadings = module.head_loadings()
    for column in range(4):
        assert_close(loadings[:, column], module.decoder[:, column * 3 : column * 3 + 3].norm(dim=1))


def test_feature_norms_sum_over_layers_or_take_the_whole_row():
    per_layer = [grouped_module()[0].decoder[:, :6].norm(dim=1), grouped_module()[0].decoder[:, 6:].norm(dim=1)]
    assert_close(grouped_module()[0].feature_norms(), per_layer[0] + per_layer[1])
    whole = (per_layer[0].square() + per_layer[1].square()).sqrt()
    assert_close(grouped_module("whole")[0].feature_norms(), whole)


def test_the_loss_of_features_of_one_layer_each_is_the_sum_of_the_layers_losses():
    joint, (batch, *_) = started("value_sae-two/l1")
    with torch.no_grad():
        joint.decoder[:12, 10:] = 0.0
        joint.decoder[12:, :10] = 0.0
        joint.encoder.weight[:12, 10:] = 0.0
        joint.encoder.weight[12:, :10] = 0.0
    parts: dict[str, list[torch.Tensor]] = {}
    for i, layer in enumerate((2, 4)):
        columns, features = slice(i * 10, i * 10 + 10), slice(i * 12, i * 12 + 12)
        config = joint.config.model_copy(update={"layers": (layer,), "features": 12})
        single = build(config, joint.dims)
        with torch.no_grad():
            single.decoder.copy_(joint.decoder[features, columns])
            single.decoder_bias.copy_(joint.decoder_bias[columns])
            single.encoder.weight.copy_(joint.encoder.weight[features, columns])
            single.encoder.bias.copy_(joint.encoder.bias[features])
            single.means.copy_(joint.means[columns])
            single.scales.copy_(joint.scales[i : i + 1])
        for name, part in single.loss(batch).parts.items():
            parts.setdefault(name, []).append(part)
    for name, part in joint.loss(batch).parts.items():
        assert_close(part, parts[name][0] + parts[name][1])


def test_columns_are_layers_then_key_value_heads_and_return_to_their_sites():
    module, (batch, *_) = started("value_sae-two/topk")
    raw = module.raw(batch)
    assert_close(raw[1][1, 3, 5:10], batch[Site(4, "v")][1, 1, 3])
    returned = module.denormalise(module.target(batch))
    assert_close(returned[Site(4, "v")], batch[Site(4, "v")], rtol=1e-4, atol=1e-4)
