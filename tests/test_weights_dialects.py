"""Checkpoints of others: the names differ, the answers do not.

`dialects.json` and `tiny.safetensors` were written by timm 1.0.31, safetensors 0.8.0 and torch 2.15, and Hugging
Face's two entries by transformers 5.24.0, with the program below. The first holds, for each dialect, the names and
shapes that a checkpoint has and timm's float64 answer (logits, or features without a head; Hugging Face's own for
theirs) for `wave` images with the weights of `checkpoints.values`.

    def make(**kwargs):
        return VisionTransformer(img_size=12, patch_size=4, embed_dim=8, depth=2, num_heads=2,
                                 **{'num_classes': 0, **kwargs})                 # timm's

    def shapes_of(model, prefix=''):
        return {prefix + n: list(x.shape) for n, x in model.state_dict().items()}

    def add(dialect, shapes, theirs, model):                                     # theirs: timm's name -> the file's
        state = values(shapes)
        model.load_state_dict({n: state[theirs(n)] for n in model.state_dict()})
        golden[dialect] = {'shapes': shapes, 'answer': model.double().eval()(wave((2, 3, 12, 12), 0, 1.0)).tolist()}

    m = make(num_classes=3)
    add('timm', shapes_of(m), str, m)
    add('moco_v3_linear', shapes_of(m, 'module.'), 'module.{}'.format, m)
    m = make()
    decoder = ModuleDict({'decoder_embed': Linear(8, 4), 'decoder_norm': LayerNorm(4), 'decoder_pred': Linear(4, 48)})
    add('mae', {'mask_token': [1, 1, 4], 'decoder_pos_embed': [1, 10, 4]} | shapes_of(m) | shapes_of(decoder), str, m)
    both = {}                       # mlp: linear without bias, BatchNorm, ReLU; no ReLU at the end
    for e in ('base_encoder', 'momentum_encoder'):
        both |= shapes_of(m, f'module.{e}.') | shapes_of(mlp(8, 6, 6, 4), f'module.{e}.head.')
    add('moco_v3', both | shapes_of(mlp(4, 6, 4), 'module.predictor.'), 'module.base_encoder.{}'.format, m)
    m = make(init_values=1.0)
    add('dinov2', {'mask_token': [1, 8]} | shapes_of(m), str, m)
    m = make(init_values=1.0, no_embed_class=True, num_classes=3)
    add('deit3', {name of its release: shape}, timm's checkpoint_filter_fn(adapt_layer_scale=True), m)
    for 'jax' with its head of 3 classes, 'jax_in21k' with pre_logits and a head of 5:
        numpy.savez('jax.npz', **values({name of the release: shape}))
        m = make(num_classes=3 or 0)
        m.load_pretrained('jax.npz')                                             # timm's own reader
    config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=12,
                       patch_size=4, num_labels=3, layer_norm_eps=1e-6)          # Google's and timm's; theirs is 1e-12
    for 'hugging_face', ViTForImageClassification and 'hugging_face_in21k', ViTModel, its last hidden z_cls:
        kind(config).save_pretrained('hf')                                       # for its names, sorted
        safetensors.torch.save_file(values({name in the file: shape}), 'hf/model.safetensors')
        m = kind.from_pretrained('hf')                                           # its own reader
    m, kinds = make(num_classes=3), (float32, float16, bfloat16, float64)
    state = {n: x.to(kinds[i % 4]) for i, (n, x) in enumerate(values(shapes_of(m)).items())}
    safetensors.torch.save_file(state, 'tiny.safetensors', metadata={'format': 'pt'})
    m.load_state_dict(state)        # golden 'safetensors'
"""

import argparse
import logging

import pytest
import torch
import yaml
from checkpoints import DIALECTS, HERE, SUFFIXES, save, state_of, tiny
from test_3_1_timm import wave

import train
import vit
from vit import InputError

CONFIGS = yaml.safe_load((HERE.parent / 'configs.yaml').read_text())
FILES = [name for name in DIALECTS if name != 'safetensors']


def answers(path, dialect):
    """Ours for a file, and timm's for the dialect."""
    expected = torch.tensor(DIALECTS[dialect]['answer'])
    model = tiny(classes=3 if expected.shape[1] == 3 else 0)
    vit.load_weights(model, path)
    with torch.no_grad():
        return model(wave((2, 3, 12, 12), 0, 1.0).float()), expected


def agree(path, dialect):
    torch.testing.assert_close(*answers(path, dialect), rtol=0, atol=1e-5)


def refusal(model, path, state):
    """The one line with which a state dict is refused. The model is what it was."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        vit.load_weights(model, save(path, state))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert len(str(error.value).splitlines()) == 1 and str(path) in str(error.value)
    return str(error.value)


# ---- What is loaded gives timm's answers ----------------------------------------------------------------


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('dialect', FILES)
def test_every_dialect_in_every_kind_of_file_gives_the_answers_of_timm(dialect, suffix, tmp_path):
    state = {n: x for n, x in state_of(dialect).items() if suffix != '.safetensors' or x.is_floating_point()}
    agree(save(tmp_path / f'weights{suffix}', state), dialect)


def test_a_file_of_the_safetensors_library_gives_the_answers_of_timm():
    """Its tensors are in float32, float16, bfloat16 and float64, one after the other."""
    agree(HERE / 'tiny.safetensors', 'safetensors')


@pytest.mark.parametrize('suffix', ['.pt', '.bin', '.tar', '.pth.tar', ''])
def test_a_file_of_any_other_name_is_one_of_torch(suffix, tmp_path):
    agree(save(tmp_path / f'weights{suffix}', state_of('timm')), 'timm')


def test_a_file_from_before_torch_1_6_is_still_one_of_torch(tmp_path):
    torch.save(state_of('timm'), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    agree(tmp_path / 'old.pth', 'timm')


@pytest.mark.parametrize('dialect, wrapped', [
    ('mae', lambda state: {'model': state}),
    ('deit3', lambda state: {'model': state}),
    ('moco_v3', lambda state: {'epoch': 300, 'arch': 'vit_base', 'state_dict': state, 'optimizer': {'state': {
        0: {'step': 9, 'exp_avg': torch.zeros(3)}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]}, 'scaler': {}}),
    ('moco_v3_linear', lambda state: {'epoch': 90, 'state_dict': state, 'best_acc1': torch.tensor(76.7)})],
    ids=['MAE', 'DeiT III', 'MoCo-v3', 'MoCo-v3, linear'])
def test_a_state_dict_is_found_in_what_its_training_saved_with_it(dialect, wrapped, tmp_path):
    agree(save(tmp_path / 'checkpoint.pth', wrapped(state_of(dialect))), dialect)


def test_jax_parameters_may_stand_below_opt_target(tmp_path):
    state = {f'opt/target/{name}': x for name, x in state_of('jax').items()}
    agree(save(tmp_path / 'weights.npz', state), 'jax')


def test_moco_v3_gives_its_momentum_encoder_where_there_is_no_other(tmp_path):
    state = {name.replace('base_encoder', 'momentum_encoder'): x for name, x in state_of('moco_v3').items()
             if 'base_encoder' in name}
    agree(save(tmp_path / 'weights.pth', state), 'moco_v3')


def test_a_layer_scale_of_1_changes_not_a_bit(tmp_path):
    state = state_of('timm') | {f'blocks.{l}.ls{i}.gamma': torch.ones(8) for l in (0, 1) for i in (1, 2)}
    model = tiny()
    vit.load_weights(model, save(tmp_path / 'weights.pth', state))
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize('dialect', FILES)
def test_position_embeddings_of_every_dialect_are_resampled_alike(dialect, tmp_path):
    path = save(tmp_path / 'weights.npz', state_of(dialect))
    model, larger = tiny(classes=0), tiny(classes=0, pixels=20)
    vit.load_weights(model, path)
    vit.load_weights(larger, path)
    assert torch.equal(larger.pos_embed, vit.resample_pos_embed(model.pos_embed, 25))


@pytest.mark.parametrize('prefix', ['vit.', 'model.', 'backbone.', 'module.', 'encoder.', 'module.model.backbone.'])
@pytest.mark.parametrize('dialect', ['timm', 'mae', 'dinov2', 'hugging_face_in21k'])
def test_what_a_wrapper_puts_before_all_names_is_removed(dialect, prefix, tmp_path):
    """DataParallel, a class with a ViT in it, Hugging Face's own ViTForImageClassification."""
    agree(save(tmp_path / 'weights.pth', {prefix + name: x for name, x in state_of(dialect).items()}), dialect)


def test_a_wrappers_own_head_stays_beside_the_vit_without_its_prefix(tmp_path):
    state = {name if 'head' in name else f'backbone.{name}': x for name, x in state_of('timm').items()}
    agree(save(tmp_path / 'weights.pth', state), 'timm')


@pytest.mark.parametrize('more', ['encoder.', ''])
def test_names_stay_where_a_prefix_would_choose_between_two_vits(more, tmp_path):
    """A student and its teacher, or a head with and one without the prefix: neither is taken for the other."""
    state = {f'model.{name}': x for name, x in state_of('timm').items()}
    state |= {more + name: x for name, x in state_of('timm').items() if more or 'head' in name}
    said = refusal(tiny(), tmp_path / 'weights.pth', state)
    assert 'missing: blocks.0' in said and 'not of a plain ViT: ' in said


def test_a_prefix_of_another_name_is_not_removed(tmp_path):
    state = {f'teacher.{name}': x for name, x in state_of('timm').items()}
    assert 'not of a plain ViT: teacher.blocks' in refusal(tiny(), tmp_path / 'weights.pth', state)


def test_hugging_faces_pooler_has_no_part_in_features_whatever_it_holds(tmp_path):
    """It stands behind them, and their own classifier does not read it."""
    state = state_of('hugging_face_in21k')
    agree(save(tmp_path / 'weights.pth', state | {'pooler.dense.weight': torch.ones(5)}), 'hugging_face_in21k')


def test_a_head_behind_pre_logits_is_not_taken_for_a_head_on_features(tmp_path, caplog):
    """JAX, ImageNet-21k: logits are head(tanh(pre_logits(features))), which no plain ViT computes."""
    model = tiny(classes=5)
    own = model.head.weight.detach().clone()
    vit.load_weights(model, save(tmp_path / 'weights.npz', state_of('jax_in21k')))
    assert torch.equal(model.head.weight, own)
    assert torch.equal(model.norm.weight, state_of('jax_in21k')['Transformer/encoder_norm/scale'])


def test_the_head_of_a_linear_classifier_stays_and_a_projection_goes(tmp_path, caplog):
    model = tiny(classes=5)
    with caplog.at_level(logging.WARNING):
        vit.load_weights(model, save(tmp_path / 'a.pth', state_of('moco_v3')))
        assert not caplog.records
        vit.load_weights(model, save(tmp_path / 'b.pth', state_of('moco_v3_linear')))
    assert 'its head for 3 classes is left out' in caplog.text


# ---- What a plain ViT cannot be -------------------------------------------------------------------------


@pytest.mark.parametrize('name', [
    'reg_token', 'register_tokens', 'dist_token', 'head_dist.weight', 'blocks.1.attn.relative_position_bias_table',
    'blocks.0.attn.q_norm.weight', 'blocks.0.mlp.w12.weight', 'fc_norm.weight', 'norm_pre.weight'])
def test_what_a_plain_vit_has_not_is_refused_by_name(name, tmp_path):
    """Registers, distillation, relative positions, norms of queries and keys, SwiGLU and more norms."""
    for dialect, prefix in ('timm', ''), ('dinov2', ''), ('moco_v3_linear', 'module.'):
        said = refusal(tiny(), tmp_path / 'weights.pth', state_of(dialect) | {prefix + name: torch.ones(8)})
        assert f'not of a plain ViT: {name}' in said


def test_the_small_vit_of_moco_v3_is_refused_because_its_12_heads_cannot_be_seen(tmp_path):
    """Its sines and cosines are 0 for the class token; DeiT's small ViT, with 6 heads, learned them."""
    model = vit.ViT(12, 4, 384, 1, 6)
    state = {f'module.base_encoder.{name}': x.clone() for name, x in model.state_dict().items()}
    vit.load_weights(model, save(tmp_path / 'deit.pth', state))
    state['module.base_encoder.pos_embed'][:, 0] = 0
    assert 'ViT-S has 12 heads' in refusal(model, tmp_path / 'moco.pth', state)


@pytest.mark.parametrize('N_h', [1, 4])
def test_jax_parameters_for_another_number_of_heads_are_refused(N_h, tmp_path):
    assert f'not for N_h={N_h} heads' in refusal(tiny(N_h=N_h), tmp_path / 'weights.npz', state_of('jax'))


@pytest.mark.parametrize('dialect', FILES)
def test_no_parameter_of_any_dialect_can_be_missing(dialect, tmp_path):
    """But those that are dropped, a head, and a LayerScale, which not all ViTs have."""
    model = tiny()
    state = {name: x for name, x in state_of(dialect).items() if x.is_floating_point()}
    for name in state:
        if not any(part in name for part in ('head', 'decoder', 'mask_token', 'momentum', 'predictor', 'pre_logits',
                                             'gamma', 'classifier', 'pooler')):
            said = refusal(model, tmp_path / 'weights.safetensors', {n: x for n, x in state.items() if n != name})
            assert 'does not fit this ViT' in said


def test_what_is_pickled_beside_the_state_dict_is_named_and_not_run(tmp_path):
    said = refusal(tiny(), tmp_path / 'weights.pth', {'model': state_of('timm'), 'args': argparse.Namespace(lr=0.1)})
    assert 'it holds a argparse.Namespace' in said and 'save model.state_dict() alone' in said and 'download' not in said


# ---- configs.yaml ---------------------------------------------------------------------------------------

COUNTS = {  # without a head, and the paper's figure in M (Table 18), which is cut, not rounded
    'vit_base_patch16_224.orig_in21k': (85_798_656, 85), 'vit_large_patch16_224.orig_in21k': (303_301_632, 307),
    'vit_huge_patch14_224.orig_in21k': (630_764_800, 630), 'vit_base_patch16_224.mocov3': (85_798_656, 85),
    'vit_base_patch16_224.mae': (85_798_656, 85)}


@pytest.mark.parametrize('name', COUNTS)
def test_the_backbones_of_tables_5_and_6_have_the_papers_size(name):
    """307 M is Dosovitskiy et al.'s figure for ViT-L, which no count of its parameters gives: 303.3 M alone,
    304.3 M with the 1,000 classes of ImageNet. The other two are the parameters without a head, cut to M."""
    count, paper = COUNTS[name]
    with torch.device('meta'):
        model = vit.build(name)
        with_head = vit.build(name, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == count
    assert CONFIGS['models'][name]['paper_backbone_params'] == paper
    if 'large' in name:
        assert count // 10 ** 6 == 303 and sum(p.numel() for p in with_head.parameters()) // 10 ** 6 == 304
    else:
        assert count // 10 ** 6 == paper


@pytest.mark.parametrize('name', CONFIGS['models'])
def test_every_model_has_a_source_and_what_its_inputs_were_normalised_with(name):
    config, = train.settings(CONFIGS, 'pets', 'ivpt', name)
    entry = CONFIGS['models'][name]
    assert vit.parse_name(name) and config.img_size in (48, 224, 512)
    assert (config.mean, config.std) == (entry['mean'], entry['std'])
    assert config.weights.endswith('tests/nano.pth') or config.weights.startswith('https://')


@pytest.mark.parametrize('size', ['small', 'base'])
def test_dinov2_is_built_for_224_pixels_of_its_37_by_37_positions(size):
    name = f'vit_{size}_patch14_224.dinov2'
    with torch.device('meta'):
        assert name in CONFIGS['models'] and vit.build(name).M == 256 and vit.build(name, img_size=518).M == 37 ** 2
