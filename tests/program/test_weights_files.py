"""Bad files: one clear line each. Nothing in a file is run, nothing hangs, no header is trusted with memory."""

import argparse
import os
import pickle
import re
import resource
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from checkpoints import DIALECTS, SUFFIXES, same, safetensors, save, state_of, tiny
from checkpoints import refusal as refused
from hypothesis import assume, given
from hypothesis import strategies as st

import vit
from vit import InputError

every_format = pytest.mark.parametrize('suffix', SUFFIXES)
FIRST = 'blocks.0.attn.qkv.weight'
MODEL, MEAN = tiny(), tiny(readout='mean')
TRUTH = state_of('timm')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('files')


@pytest.fixture(scope='module')
def whole(folder):
    """The bytes of a good file of each format."""
    return {suffix: save(folder / f'whole{suffix}', TRUTH).read_bytes() for suffix in SUFFIXES}


@pytest.fixture(autouse=True)
def no_huge_allocation():
    """No test here may take 500 MB more than was ever taken; the files are a few kB and claim many GB."""
    before = peak()
    yield
    assert peak() - before < 500


def peak():
    """The most memory that was ever taken, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)


def written(path, content):
    path.write_bytes(content)
    return path


def refusal(path):
    """The line that refuses a file and names it."""
    said = refused(MODEL, path)
    assert str(path) in said
    return said


def right_or_refused(path, exact=True):
    """Whether a file is loaded, as what was saved into it, or as numbers at least. Otherwise it is refused."""
    try:
        vit.load_weights(MODEL, path)
    except InputError:
        assert refusal(path)
        return False
    state = MODEL.state_dict()
    assert same(state, TRUTH) if exact else all(x.isfinite().all() for x in state.values())
    return True


@every_format
@given(data=st.data())
def test_a_file_that_is_cut_anywhere_is_refused(suffix, data, whole, folder):
    end = data.draw(st.integers(0, len(whole[suffix]) - 1))
    assert 'cut short' in refusal(written(folder / f'cut{suffix}', whole[suffix][:end]))


@every_format
@given(data=st.data())
def test_damage_in_a_file_is_found_by_its_checksums_or_gives_numbers(suffix, data, whole, folder):
    """numpy's and torch's files have checksums: what is loaded is what was saved. A safetensors file has none."""
    content = bytearray(whole[suffix])
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from([0, len(content) // 2, len(content) - 3000]))  # header, middle, directory
        content[data.draw(st.integers(part, min(part + 3000, len(content)) - 1))] = data.draw(st.integers(0, 255))
    right_or_refused(written(folder / f'damaged{suffix}', bytes(content)), exact=suffix != '.safetensors')


def test_a_folder_a_pipe_and_a_missing_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / 'pipe')  # opened, it would wait for ever
    for path in tmp_path, tmp_path / 'pipe', tmp_path / 'missing.pth', 'x' * 300:
        assert 'there is no such file' in refusal(path)


@pytest.mark.parametrize('content, said', [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346\n', 'a pointer of Git LFS: git lfs pull'),
    (b'<!DOCTYPE html><html>moved</html>', 'a web page: download the file itself'),
    (b'\n<?xml version="1.0"?><Error/>', 'a web page'),
    (b'{\n  "metadata": {"total_size": 9}, "weight_map": {}}', 'JSON: if it lists the parts of a checkpoint'),
    (b'weights.pth'.ljust(257, b'\0') + b'ustar', 'a tar archive: unpack it'),
    (b'# Some words', 'is cut short: Unsupported operand 35')], ids=['LFS', 'page', 'XML', 'index', 'tar', 'text'])
@pytest.mark.parametrize('name', ['weights.pth', 'weights.safetensors', 'model.index.json'])
def test_what_is_no_checkpoint_is_called_what_it_is(content, said, name, tmp_path):
    assert said in refusal(written(tmp_path / name, content))


@pytest.mark.parametrize('content, said', [
    (torch.zeros(3), 'no tensors'), ([torch.zeros(3)], 'no tensors'), ({}, 'no tensors'), (None, 'no tensors'),
    ({'norm.bias': 0.0, 'epoch': 3}, 'epoch, norm'), ({'model': {}, 'args': [1]}, 'args, model'),
    ({'patch_embed.proj.weight': 0.0}, 'patch_embed'), ({0: torch.zeros(3)}, '0'),
    ({'model': {'norm': {'bias': torch.zeros(8)}}, 'optimizer': {'lr': torch.ones(1)}}, 'model, optimizer'),
    ({f'layer{i}': torch.zeros(3) for i in range(9)}, 'layer0, layer1, layer2, layer3 and 5 more')],
    ids=['tensor', 'list', 'empty', 'none', 'numbers', 'no values', 'no weight', 'no name', 'nested', 'another'])
def test_a_file_without_a_vit_is_refused_with_what_it_holds(content, said, tmp_path):
    line = refusal(save(tmp_path / 'weights.pth', content))
    assert 'holds no ViT' in line and 'patch_embed.proj.weight' in line and line.endswith(f'it holds {said}')


class Evil(str):
    """A path. Pickled, it makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.mark.parametrize('dump, read', [
    (torch.save, lambda file: torch.load(file, weights_only=False)),
    (lambda x, file: torch.save(x, file, _use_new_zipfile_serialization=False),
     lambda file: torch.load(file, weights_only=False)),
    (lambda x, file: pickle.dump(x, file, protocol=2), pickle.load),
    (lambda x, file: np.savez(file, **{FIRST: np.array([x[FIRST]], dtype=object)}),
     lambda file: np.load(file, allow_pickle=True)[FIRST])], ids=['torch', 'old torch', 'pickle', 'numpy'])
@pytest.mark.parametrize('name', ['evil.pth', 'evil.npz', 'evil.safetensors'])
def test_code_in_a_file_is_not_run(dump, read, name, tmp_path):
    with open(tmp_path / name, 'wb') as file:
        dump({FIRST: Evil(tmp_path / 'run')}, file)
    said = refusal(tmp_path / name)
    assert 'is not a checkpoint' in said and 'weights_only' not in said and not (tmp_path / 'run').exists()
    with open(tmp_path / name, 'rb') as file:
        read(file)  # without care, it is run
    assert (tmp_path / 'run').exists()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('write, said', [
    (lambda path: torch.save(tiny(), path), 'vit.ViT, which is code'),
    (lambda path: torch.save(tiny(), path, _use_new_zipfile_serialization=False), 'vit.ViT, which is code'),
    (lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), path), 'TorchScript, which is code'),
    (lambda path: torch.save({'model': TRUTH, 'args': argparse.Namespace(lr=0.1)}, path), 'argparse.Namespace, which')],
    ids=['model', 'model, old', 'TorchScript', 'beside'])
def test_an_object_of_a_class_is_called_what_it_is_and_refused_with_what_to_save_instead(write, said, tmp_path):
    write(tmp_path / 'model.pth')
    line = refusal(tmp_path / 'model.pth')
    assert f'it holds a {said}' in line and 'save model.state_dict() alone' in line and 'weights_only' not in line


lengths = st.integers(0, 2 ** 64 - 1) | st.sampled_from([0, 1, 2, 8, 2 ** 31, 2 ** 32, 2 ** 40, 2 ** 63])
lies = st.one_of(st.integers(-9, 9), lengths, st.integers(10 ** 30, 10 ** 31), st.none(), st.booleans(),
                 st.text(max_size=5), st.floats(), st.lists(lengths | st.integers(-3, 12), max_size=4), st.just({}))


def with_entry(key, lie):
    """A safetensors file with another value at a key of its first tensor."""
    return safetensors(TRUTH, lambda header: header | {FIRST: header[FIRST] | {key: lie}})


headers = st.recursive(lies, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3))
lying = st.one_of(
    st.builds(with_entry, st.sampled_from(['dtype', 'shape', 'data_offsets']), lies),
    headers.map(lambda header: safetensors(TRUTH, lambda _: header)),
    lengths.map(lambda length: struct.pack('<Q', length) + safetensors(TRUTH)[8:]),
    st.sampled_from([struct.pack('<Q', 10 ** 5 * len(nested)) + nested * 10 ** 5 for nested in (b'[', b'{"a":')]))


@given(content=lying)
def test_a_false_safetensors_header_is_refused(content, folder):
    """In one of its entries, in all of them, in its length, or nested without end."""
    assume(content != safetensors(TRUTH))
    refusal(written(folder / 'lie.safetensors', content))


def test_a_safetensors_header_may_name_its_tensors_in_any_order(folder):
    """Its own library writes them by type and name; JSON's order means nothing."""
    content = safetensors(TRUTH, lambda header: {name: header[name] for name in sorted(header)})
    assert right_or_refused(written(folder / 'order.safetensors', content))


def test_bytes_between_behind_or_shared_by_tensors_are_refused(folder):
    """As the format's own reader does; otherwise two tensors could be one, or a file two files."""
    def span(name, change):
        return lambda header: header | {name: header[name] | {'data_offsets': change(*header[name]['data_offsets'])}}
    for content in (safetensors(TRUTH) + b'....',
                    safetensors(TRUTH, lambda header: header | {'norm.bias': header['norm.weight']}),
                    safetensors(TRUTH, span('head.bias', lambda start, stop: [start, 2 ** 40])),
                    safetensors(TRUTH, span('norm.bias', lambda start, stop: [start + 4, stop]))):
        assert 'do not lie side by side' in refusal(written(folder / 'spans.safetensors', content))


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.bool])
def test_integers_beside_the_weights_are_left_in_every_kind_of_file(dtype, tmp_path):
    """Counters, indices, masks."""
    beside = {'num_batches_tracked': torch.tensor(9), 'blocks.0.attn.index': torch.arange(4), 'step': torch.ones(2)}
    for suffix in SUFFIXES:
        state = TRUTH | {name: x.to(dtype) for name, x in beside.items()}
        vit.load_weights(model := tiny(seed=1), save(tmp_path / f'weights{suffix}', state))
        assert same(model.state_dict(), TRUTH)


def rewritten(source, path, change):
    """A zip file again, its members changed and their checksums right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, 'w') as new:
        for member in old.namelist():
            new.writestr(member, change(member, old.read(member)))
    return path


@given(shape=st.lists(st.integers(0, 2 ** 40), max_size=4) | st.sampled_from([[2 ** 32], [2 ** 40, 2 ** 40], [-1]]),
       descr=st.sampled_from(['<f4', '<f8', '|O', '|S0', '|V0', '<U9', '>f4', '<c8', '<M8[s]']))
def test_a_false_array_header_is_refused(shape, descr, whole, folder):
    assume(shape != [24, 8] or descr != '<f4')

    def change(member, content):
        if member != f'{FIRST}.npy':
            return content
        header = str({'descr': descr, 'fortran_order': False, 'shape': tuple(shape)}).encode()
        return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header + content[128:]
    refusal(rewritten(folder / 'whole.npz', folder / 'lie.npz', change))


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('claim', [0, 1, 191, 193, 2 ** 28, 2 ** 30, 2 ** 31 - 1])
def test_a_pickle_that_claims_a_larger_storage_than_there_is_is_refused(claim, zipped, folder):
    """BININT is 4 bytes, so a storage of 192 numbers can claim to be one of 8 GB."""
    source, path = folder / 'truth.pth', folder / 'lie.pth'
    torch.save(TRUTH, source, _use_new_zipfile_serialization=zipped)
    truth, lie = b'K\xc0' + (b't' if zipped else b'N'), b'J' + struct.pack('<i', claim) + (b't' if zipped else b'N')
    assert truth in source.read_bytes()
    if zipped:
        rewritten(source, path, lambda member, content: content.replace(truth, lie, 1))
    else:
        path.write_bytes(source.read_bytes().replace(truth, lie, 1))
    loaded = right_or_refused(path)
    assert not loaded or not zipped and claim <= 192  # torch lets an old file's storage grow to its tensor


def test_a_zip_file_that_unpacks_to_far_more_than_it_is_is_refused(folder):
    """10 MB of zeros take 10 kB."""
    for name in ('bomb.npz', 'bomb.pth'):
        with zipfile.ZipFile(folder / name, 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('norm.weight.npy', bytes(10 ** 7))
        assert 'unpacks to far more' in refusal(folder / name)


def bomb(levels, key):
    """A dict in dicts, twice in each level."""
    tree = dict(TRUTH)
    for _ in range(levels):
        tree = {f'{key}1': tree, f'{key}2': tree}
    return tree


IN_ITSELF = dict(TRUTH)
IN_ITSELF['again'] = {'more': IN_ITSELF}


@pytest.mark.parametrize('content', [bomb(40, 'k'), bomb(9, 'k' * 10 ** 6), IN_ITSELF],
                         ids=['doubled', 'long names', 'in itself'])
def test_dicts_in_dicts_take_no_more_time_and_memory_than_the_file(content, folder):
    """10^12 names, or a million characters in each of them, or names without end."""
    try:
        vit.load_weights(tiny(), save(folder / 'dicts.pth', content))
    except InputError as error:
        assert len(str(error)) < 1000


def test_a_dict_nested_without_end_is_refused(folder):
    n, source = 10 ** 5, save(folder / 'whole.pth', TRUTH)
    deep = b'\x80\x02' + b'}X\x01\x00\x00\x00k' * n + b'}' + b's' * n + b'.'
    refusal(rewritten(source, folder / 'deep.pth', lambda member, x: deep if member.endswith('data.pkl') else x))


@pytest.mark.parametrize('odd', [
    lambda x: x[:1, :1].half().expand(2 ** 15, 2 ** 15), lambda x: x.to('meta'), lambda x: x.to_sparse(),
    lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), torch.Tensor.long, torch.Tensor.bool,
    lambda x: x.to(torch.complex64)],
    ids=['expanded', 'meta', 'sparse', 'quantized', 'integers', 'booleans', 'complex'])
@pytest.mark.filterwarnings('ignore')
def test_tensors_without_real_numbers_of_their_own_are_refused(odd, folder):
    said = refusal(save(folder / 'odd.pth', TRUTH | {FIRST: odd(torch.zeros(24, 8))}))
    assert f'missing: {FIRST}' in said or 'larger than the file' in said


@pytest.mark.parametrize('dialect, name, x', [
    ('dinov2', 'blocks.0.ls1.gamma', torch.ones(2 ** 18)), ('timm', 'pos_embed', torch.ones(1, 2, 2 ** 21)),
    ('dinov2', 'blocks.0.attn.proj.bias', torch.ones(1))])
def test_tensors_that_loading_computes_cannot_grow_far_beyond_the_file(dialect, name, x, folder):
    """diag(γ) of 2^18 gammas has 2^36 numbers; 2^21 at 1 position become 2^29 and more at 16 x 16."""
    with pytest.raises(InputError, match=name):
        vit.load_weights(tiny(pixels=64), save(folder / 'wide.pth', state_of(dialect) | {name: x}))


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@given(name=st.text(min_size=1), shape=st.lists(st.integers(1, 2), max_size=3))
def test_a_name_from_a_file_cannot_write_to_the_terminal(suffix, name, shape, folder):
    """Neither a second line nor an escape sequence, in a refusal or in the line that says what is left."""
    assume(name.encode('utf-8', 'ignore').decode() == name)
    path, name, x, lines = folder / f'name{suffix}', f'{name}\x1b[2J\n', torch.ones(shape), []
    assert 'not of a plain ViT: ' in refusal(save(path, TRUTH | {name: x}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit.log, 'warning', lines.append)
        vit.load_weights(MODEL, save(path, {f'vit.{n}': y for n, y in TRUTH.items()} | {name: x}))
    assert 'left is ' in lines[0] and all(line.isprintable() for line in lines)


@pytest.mark.parametrize('dialect, name, bad, timms', [
    ('dinov2', 'blocks.1.ls2.gamma', 'nan', 'blocks.1.mlp.fc2'),
    ('moco_v3_linear', 'module.norm.bias', 'nan', 'norm.bias'),
    ('jax', 'Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias', 'nan', 'blocks.1.attn.qkv.bias'),
    ('timm', 'norm.bias', '1e300', 'norm.bias')])  # is infinite in single precision
def test_what_is_not_finite_in_a_dialect_or_in_single_precision_is_refused_by_timms_name(
        dialect, name, bad, timms, folder):
    state = state_of(dialect)
    state[name] = torch.full_like(state[name], float(bad), dtype=torch.float64)
    assert f'NaN or infinite values in {timms}' in refusal(save(folder / 'nan.pth', state))


@given(data=st.data())
def test_a_parameter_of_another_shape_is_refused_in_every_dialect(data, folder):
    """But a head is left out, positions on another grid are resampled, and what is dropped can be anything."""
    dialect = data.draw(st.sampled_from([name for name in DIALECTS if name != 'safetensors']))
    state, model = state_of(dialect), MEAN if dialect == 'fc_norm' else MODEL
    name = data.draw(st.sampled_from(list(state)))
    shape = data.draw(st.lists(st.integers(0, 12), max_size=5))
    assume(shape != list(state[name].shape))
    path = save(folder / 'shape.safetensors', state | {name: torch.ones(shape)})
    dropped = 'head|classifier|pos|mask_token|decoder|momentum_enc|predictor|pre_logits|pooler'
    try:
        vit.load_weights(model, f'{path}#base_encoder' if dialect == 'moco_v3' else path)
        assert re.search(dropped, name), (name, shape)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
