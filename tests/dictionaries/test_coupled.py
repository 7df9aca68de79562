"""The baselines for QK/OV coupling: who trains what, and through which head features go."""

import copy

import pytest
import torch
from torch.testing import assert_close

from crosshead.dictionaries.base import Batch, Site
from crosshead.dictionaries.registry import build, config_class
from tests.dictionaries.cases import DIMS, LAYERS, config_of, padded_batch, random_batch, weights
from tests.dictionaries.test_contract import started

SAE = {"encoder.weight", "encoder.bias", "encoder.log_threshold", "sae_decoder", "sae_bias"}
MTC = {"decoder", "decoder_bias", "loadings", "bos"}


def gradients(module, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("form", ["l1", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("base", ["joint_mtc", "joint_mtc-all"])
def test_the_two_parts_of_the_joint_loss_train_disjoint_parameters(base, form):
    module, (batch, *_) = started(f"{base}/{form}")
    parts = module.loss(batch, 0.5).parts
    assert gradients(module, parts.pop("reconstruction")).keys() == MTC
    names = set().union(*(gradients(module, part).keys() for part in parts.values()))
    assert names == SAE & dict(module.named_parameters()).keys()


def test_one_joint_loss_under_adam_is_an_sae_run_and_an_mtc_run_side_by_side():
    """Interleaved: an optimiser of its own for each half, on activations from before the SAE's step."""
    joint, batches = started("joint_mtc/batch_topk")
    apart = copy.deepcopy(joint)
    optimiser = torch.optim.Adam(joint.parameters(), lr=1e-2)
    named = dict(apart.named_parameters())
    halves = [
        torch.optim.Adam([named[n] for n in names if n in named], lr=1e-2) for names in (sorted(MTC), sorted(SAE))
    ]
    for step, batch in enumerate(batches * 3):
        optimiser.zero_grad()
        joint.loss(batch, step / 12).total.backward()
        optimiser.step()
        parts = apart.loss(batch, step / 12).parts
        for half, losses in zip(halves, (["reconstruction"], ["sae"]), strict=True):
            half.zero_grad()
            sum(parts[name] for name in losses).backward()
        for half in halves:
            half.step()
    for name, parameter in joint.named_parameters():
        assert_close(parameter, named[name], rtol=1e-6, atol=1e-7, msg=name)


def test_the_joint_sae_is_trained_as_one_without_any_transcoder():
    """What the MTC half does leaves no trace in the activations."""
    first, batches = started("joint_mtc/topk")
    second = copy.deepcopy(first)
    with torch.no_grad():
        for name in MTC:
            getattr(second, name).normal_(generator=torch.Generator().manual_seed(3))
    for module in (first, second):
        optimiser = torch.optim.Adam([
            {"params": g.parameters, "lr": 1e-2 * g.multiplier} for g in module.parameter_groups()
        ])  # fmt: skip
        for step, batch in enumerate(batches):
            optimiser.zero_grad()
            module.loss(batch, step / 4).total.backward()
            optimiser.step()
    for name in SAE & dict(first.named_parameters()).keys():
        assert torch.equal(first.get_parameter(name), second.get_parameter(name)), name
    assert torch.equal(first.encode(batches[0]).columns, second.encode(batches[0]).columns)


def test_joint_activations_compete_by_the_saes_decoder_and_not_by_what_is_moved():
    module, (batch, *_) = started("joint_mtc/topk")
    before = module.encode(batch).columns
    with torch.no_grad():
        module.decoder[::2] *= 100.0
    assert torch.equal(module.encode(batch).columns, before)
    with torch.no_grad():
        module.sae_decoder[::2] *= 100.0
    assert not torch.equal(module.encode(batch).columns, before)
    assert_close(module.feature_norms(), module.sae_decoder.norm(dim=1))


# ---- best heads ----


def brute_force(module, batch: Batch):
    """Best head [B, F] and prediction by the definition: every context, feature, head and position by itself."""
    codes = module.encode(batch).to_dense().view(*batch.mask.shape, -1)
    pattern = batch[Site(2, "pattern")].to(codes.dtype)
    n_contexts, n_positions, n_features = codes.shape
    group = DIMS.n_heads // DIMS.n_kv_heads
    prediction = torch.zeros(n_contexts, n_positions, DIMS.d_model, dtype=codes.dtype) + module.bias
    for h in range(DIMS.n_heads):
        prediction += pattern[:, h, :, :1] * module.bos[h]
    best = torch.zeros(n_contexts, n_features, dtype=torch.long)
    for c in range(n_contexts):
        for i in range(n_features):
            sizes, outputs = [], []
            for h in range(DIMS.n_heads):
                value = module.sae_decoder[i] @ module.to_value[:, h // group]
                written = torch.stack([
                    (value @ module.W_O[h]) * sum(pattern[c, h, t, s] * codes[c, s, i] for s in range(n_positions))
                    for t in range(n_positions)
                ])  # fmt: skip
                sizes.append(sum(float(written[t].norm()) for t in range(n_positions) if batch.mask[c, t]))
                outputs.append(written)
            best[c, i] = max(range(DIMS.n_heads), key=sizes.__getitem__)
            head = int(best[c, i])
            prediction[c] += module.gains[head] * outputs[head] * module.target_scale
    return best, prediction


@pytest.mark.parametrize("case", ["sae_best_head/topk", "sae_best_head-resid/l1"])
@torch.no_grad()
def test_every_feature_goes_through_the_head_that_moves_it_most_in_its_context(case):
    module, batches = started(case, n_batches=3)
    module.calibrate_(batches)
    module.eval().double()
    batch = padded_batch(0)
    codes = module.encode(batch)
    best, prediction = brute_force(module, batch)
    active = (module.movements(codes, batch) > 0).any(1)
    assert active.any()
    assert torch.equal(module.best_heads(codes, batch)[active], best[active])
    assert_close(module.decode(codes, batch), prediction)
    live = active[:3].all(0)  # the fourth context is masked
    assert (best[:3, live] != best[0, live]).any(), "no feature changes its head"


@torch.no_grad()
def test_attention_without_a_value_is_no_movement():
    module, (batch, *_) = started("sae_best_head/topk", n_batches=1)
    codes = module.encode(batch)
    attended = batch.sites[Site(2, "pattern")].sum((0, 2, 3)).argmax()
    module.W_O[attended] = 0.0
    moved = (module.movements(codes, batch) > 0).any(1)
    assert not (module.best_heads(codes, batch)[moved] == attended).any()


@torch.no_grad()
def test_gains_are_least_squares_with_the_first_tokens_term_and_the_bias():
    module, batches = started("sae_best_head/topk", n_batches=3)
    module.calibrate_(batches)
    module.eval()
    columns, target = [], []
    for b in batches:
        first = b[Site(2, "pattern")][..., 0].transpose(1, 2)[b.mask].double()
        design = torch.cat([first, torch.ones_like(first[:, :1])], dim=1)
        own = torch.kron(design, torch.eye(12, dtype=torch.float64))  # c_h and b, coordinate by coordinate
        carried = torch.stack([u[b.mask].flatten() for u in module.carried(module.encode(b), b)], dim=1).double()
        columns.append(torch.cat([carried, own], dim=1))
        target.append(module.target(b)[b.mask].flatten().double())
    solution = torch.linalg.lstsq(torch.cat(columns), torch.cat(target)).solution
    assert_close(module.gains.double(), solution[:4], rtol=1e-3, atol=1e-4)
    written = torch.cat([module.decode(module.encode(b), b)[b.mask].flatten().double() for b in batches])
    assert_close(written, torch.cat(columns) @ solution, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_layer_of_one_head_is_carried_as_well_as_its_input_is_reconstructed():
    """With features that reconstruct the input and one head that does everything, nothing is lost on the way."""
    module, batches = started("sae_best_head/topk", n_batches=3)
    batches = [with_one_head(b, 2) for b in batches]
    module.start_(batches, weights(), torch.Generator().manual_seed(0))
    # Features that say everything: plus and minus every coordinate.
    eye = torch.eye(12)
    module.encoder.weight.copy_(torch.cat([eye, -eye]))
    module.encoder.bias.zero_()
    module.sae_decoder.copy_(module.encoder.weight)
    module.config = module.config.model_copy(update={"sparsity": config_of("sae_best_head/topk", k=12).sparsity})
    module.encoder.sparsity = module.config.sparsity
    others = [h for h in range(4) if h != 2]
    module.W_O[others] = 0.0
    module.calibrate_(batches)
    module.eval()
    batch = with_one_head(random_batch(9), 2)
    error = (module.decode(module.encode(batch), batch) - module.target(batch))[batch.mask].square().sum()
    assert error < 1e-3 * module.target(batch)[batch.mask].square().sum()


def with_one_head(batch: Batch, head: int) -> Batch:
    """The same inputs (unit rms, so that values are linear in what is read) under a layer whose other heads are cut."""
    sites = dict(batch.sites)
    resid, v, pattern, out = (Site(2, name) for name in ("resid_in", "v", "pattern", "attn_out"))
    rms = sites[resid].square().mean(-1, keepdim=True).sqrt()
    sites[resid], sites[v] = sites[resid] / rms, sites[v] / rms[:, None]
    z = sites[pattern][:, head] @ sites[v][:, head // 2]
    sites[out] = z @ weights()[2].W_O[head] + weights()[2].b_O
    # What the first token contributes must be the same in every context, as it is in a real model.
    sites[out] = sites[out] + sites[pattern][:, head, :, :1] * (
        1.0 - sites[v][:, head // 2, :1] @ weights()[2].W_O[head]
    )
    return Batch(sites, batch.mask, batch.tokens)


@torch.no_grad()
def test_the_query_side_is_the_best_heads_pattern_applied_to_the_key_side():
    module, (batch, *_) = started("sae_best_head/topk")
    codes = module.encode(batch)
    feature = int(codes.columns[0])
    best = module.best_heads(codes, batch)[:, feature]
    f = module.key_side(batch, [feature])
    patterns = torch.stack([batch[Site(2, "pattern")][c, head] for c, head in enumerate(best)])
    assert_close(module.query_side(batch, [feature]), module.gains[best][:, None, None] * (patterns @ f))


def test_the_choice_is_per_context_and_sees_no_other_context():
    module, (batch, *_) = started("sae_best_head/topk")
    module.eval()
    first = Batch({site: x[:1] for site, x in batch.sites.items()}, batch.mask[:1], batch.tokens[:1])
    codes, alone = module.encode(batch), module.encode(first)
    assert torch.equal(module.best_heads(codes, batch)[:1], module.best_heads(alone, first))
    assert_close(module.decode(codes, batch)[:1], module.decode(alone, first))


@pytest.mark.parametrize("kind", ["joint_mtc", "sae_best_head"])
def test_they_survive_construction_without_memory_for_any_number_of_heads(kind):
    config = config_class(kind).model_validate(
        {"kind": kind, "layers": [LAYERS[0]], "features": 32, "sparsity": {"kind": "batch_topk", "k": 4}}
    )
    wide = DIMS.model_copy(update={"n_heads": 4096, "n_kv_heads": 4096, "head_dim": 1, "d_model": 1})
    with torch.device("meta"):
        module = build(config, wide)
    names = {site.name for site in (*module.sites, *module.start_sites)}
    assert names == {"resid_in", "pattern", "attn_out", "v"}
