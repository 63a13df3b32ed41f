"""Bad files: one clear line each. Nothing in a file is run, nothing hangs, no header is trusted with memory."""

import logging
import os
import pickle
import re
import resource
import struct
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from checkpoints import DIALECTS, SUFFIXES, safetensors, save, state_of, tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import vit
from vit import InputError

fewer = settings(max_examples=settings.default.max_examples // 3)  # where a test is several
every_format = pytest.mark.parametrize('suffix', SUFFIXES)
FIRST = 'blocks.0.attn.qkv.weight'
MODEL = tiny()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('files')


@pytest.fixture(scope='module')
def whole(folder):
    """The bytes of a good file of each format."""
    return {suffix: save(folder / f'whole{suffix}', state_of('timm')).read_bytes() for suffix in SUFFIXES}


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


def load(path):
    """A model's state dict after loading a file, and None; or None, and the one line that refused the file."""
    model = MODEL
    before = {name: x.clone() for name, x in model.state_dict().items()}
    try:
        vit.load_weights(model, path)
    except InputError as error:
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        said = str(error)
        assert len(said.splitlines()) == 1 and len(said) < 900 and said.isprintable()
        return None, said
    assert all(x.isfinite().all() for x in model.state_dict().values())
    return model.state_dict(), None


def refusal(path):
    _, said = load(path)
    assert said and str(path).partition('#')[0] in said
    return said


def same(state):
    return state is None or all(torch.equal(x, state[name]) for name, x in state_of('timm').items())


# ---- Damage ---------------------------------------------------------------------------------------------


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
    state, _ = load(written(folder / f'damaged{suffix}', bytes(content)))
    assert suffix == '.safetensors' or same(state)


@every_format
@fewer
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_bytes_and_words_are_refused(suffix, content, folder):
    assert 'is not a' in refusal(written(folder / f'bytes{suffix}', content))


@every_format
def test_a_folder_a_pipe_and_a_missing_file_are_refused(suffix, tmp_path):
    (tmp_path / f'folder{suffix}').mkdir()
    os.mkfifo(tmp_path / f'pipe{suffix}')  # opened, it would wait for ever
    assert 'not a file' in refusal(tmp_path / f'folder{suffix}') and 'not a file' in refusal(tmp_path / f'pipe{suffix}')
    assert 'no such file' in refusal(tmp_path / f'missing{suffix}') and 'no such file' in refusal('x' * 300)


@pytest.mark.parametrize('right, wrong', [('.pth', '.npz'), ('.pth', '.safetensors'), ('.npz', '.pth'),
                                          ('.npz', '.safetensors'), ('.safetensors', '.pth'), ('.safetensors', '.npz')])
def test_a_file_under_the_name_of_another_kind_is_refused(right, wrong, whole, tmp_path):
    refusal(written(tmp_path / f'weights{wrong}', whole[right]))


# ---- Headers that lie -----------------------------------------------------------------------------------

lengths = st.integers(0, 2 ** 64 - 1) | st.sampled_from([0, 1, 2, 8, 2 ** 31, 2 ** 32, 2 ** 40, 2 ** 63])
lies = st.one_of(st.integers(-9, 9), lengths, st.integers(10 ** 30, 10 ** 31), st.none(), st.booleans(), st.text(max_size=5),
                 st.floats(), st.lists(lengths | st.integers(-3, 12), max_size=4), st.just({}))


@given(length=lengths)
def test_a_safetensors_header_is_as_long_as_it_says(length, whole, folder):
    content = whole['.safetensors']
    assume(length != struct.unpack('<Q', content[:8])[0])
    said = refusal(written(folder / 'length.safetensors', struct.pack('<Q', length) + content[8:]))
    assert length <= len(content) - 8 or f'a header of {length} bytes in a file of {len(content)}' in said


@given(key=st.sampled_from(['dtype', 'shape', 'data_offsets']), lie=lies)
def test_a_safetensors_header_that_lies_is_refused(key, lie, folder):
    def change(header):
        truth = header[FIRST][key]
        assume(lie != truth)
        return header | {FIRST: header[FIRST] | {key: lie}}
    refusal(written(folder / 'lie.safetensors', safetensors(state_of('timm'), change)))


@given(header=st.recursive(lies, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)))
def test_a_safetensors_header_of_anything_is_refused(header, folder):
    content = safetensors(state_of('timm'), lambda _: header)
    refusal(written(folder / 'any.safetensors', content))


def test_a_safetensors_header_nested_without_end_is_refused(folder):
    header = b'[' * 10 ** 5
    refusal(written(folder / 'deep.safetensors', struct.pack('<Q', len(header)) + header))


@given(order=st.permutations(list(state_of('timm'))))
@fewer
def test_a_safetensors_header_may_name_its_tensors_in_any_order(order, folder):
    """Its own library writes them by type and name; JSON's order means nothing."""
    content = safetensors(state_of('timm'), lambda header: {name: header[name] for name in order})
    state, said = load(written(folder / 'order.safetensors', content))
    assert said is None and same(state)


def test_bytes_between_behind_or_shared_by_tensors_are_refused(folder):
    """As the format's own reader does; otherwise two tensors could be one, or a file two files."""
    state = state_of('timm')
    assert 'end at byte' in refusal(written(folder / 'behind.safetensors', safetensors(state) + b'....'))

    def shared(header):
        return header | {'norm.bias': header['norm.weight']}

    def behind_the_end(header):
        start, _ = header['head.bias']['data_offsets']
        return header | {'head.bias': header['head.bias'] | {'data_offsets': [start, 2 ** 40]}}
    assert 'from byte' in refusal(written(folder / 'shared.safetensors', safetensors(state, shared)))
    assert f'to {2 ** 40} of' in refusal(written(folder / 'huge.safetensors', safetensors(state, behind_the_end)))


def rewritten(source, path, change):
    """A zip file again, its members changed and their checksums right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, 'w') as new:
        for member in old.namelist():
            new.writestr(member, change(member, old.read(member)))
    return path


@given(shape=st.lists(st.integers(0, 2 ** 40), max_size=4) | st.sampled_from([[2 ** 32], [2 ** 40, 2 ** 40], [-1]]),
       descr=st.sampled_from(['<f4', '<f8', '|O', '|S0', '|V0', '<U9', '>f4', '<c8', '<M8[s]']))
def test_an_array_header_that_lies_is_refused(shape, descr, whole, folder):
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
    torch.save(state_of('timm'), source, _use_new_zipfile_serialization=zipped)
    truth, lie = b'K\xc0' + (b't' if zipped else b'N'), b'J' + struct.pack('<i', claim) + (b't' if zipped else b'N')
    assert truth in (source.read_bytes())
    if zipped:
        rewritten(source, path, lambda member, content: content.replace(truth, lie, 1))
    else:
        path.write_bytes(source.read_bytes().replace(truth, lie, 1))
    state, said = load(path)
    assert said if zipped or claim > 192 else same(state)  # torch lets an old file's storage grow to its tensor


def test_a_zip_file_that_unpacks_to_far_more_than_it_is_is_refused(folder):
    """10 MB of zeros take 10 kB."""
    for name in ('bomb.npz', 'bomb.pth'):
        with zipfile.ZipFile(folder / name, 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('norm.weight.npy', bytes(10 ** 7))
        assert 'unpacks to far more' in refusal(folder / name)


@pytest.mark.parametrize('odd', [
    lambda x: x[:1, :1].half().expand(2 ** 15, 2 ** 15), lambda x: x.to('meta'), lambda x: x.to_sparse(),
    lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)], ids=['expanded', 'meta', 'sparse', 'quantized'])
@pytest.mark.filterwarnings('ignore')
def test_tensors_without_numbers_of_their_own_are_refused(odd, folder):
    said = refusal(save(folder / 'odd.pth', state_of('timm') | {FIRST: odd(torch.zeros(24, 8))}))
    assert 'holds no state dict' in said or 'larger than the file' in said


@pytest.mark.parametrize('dialect, name, x', [
    ('dinov2', 'blocks.0.ls1.gamma', torch.ones(2 ** 18)), ('timm', 'pos_embed', torch.ones(1, 2, 2 ** 21)),
    ('dinov2', 'blocks.0.attn.proj.bias', torch.ones(1))])
def test_what_is_computed_on_the_way_cannot_grow_far_beyond_the_file(dialect, name, x, folder):
    """diag(γ) of 2^18 gammas has 2^36 numbers; 2^21 at 1 position become 2^29 and more at 16 x 16."""
    with pytest.raises(InputError, match=name):
        vit.load_weights(tiny(pixels=64), save(folder / 'wide.pth', state_of(dialect) | {name: x}))


class Evil:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_an_array_is_not_run(tmp_path):
    evil = np.empty(1, dtype=object)
    evil[0] = Evil(tmp_path / 'run')
    np.savez(tmp_path / 'evil.npz', **{FIRST: evil})
    assert 'evil.npz is not a NumPy archive' in refusal(tmp_path / 'evil.npz')
    (tmp_path / 'evil.safetensors').write_bytes(pickle.dumps(evil))
    refusal(tmp_path / 'evil.safetensors')
    assert not (tmp_path / 'run').exists()
    np.load(tmp_path / 'evil.npz', allow_pickle=True)[FIRST]  # were it loaded without care, it would be run
    assert (tmp_path / 'run').exists()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@fewer
@given(name=st.text(min_size=1), shape=st.lists(st.integers(0, 2), max_size=4))
def test_a_name_from_a_file_cannot_write_to_the_terminal(suffix, name, shape, folder):
    """Neither a second line nor an escape sequence."""
    assume(name.isprintable() is False and name.encode('utf-8', 'ignore').decode() == name)
    said = refusal(save(folder / f'name{suffix}', state_of('timm') | {f'{name}\x1b[2J\n': torch.ones(2, *shape[:1], 1)}))
    assert 'not of a plain ViT: ' in said or 'from byte' in said


# ---- Numbers that are none ------------------------------------------------------------------------------


@every_format
@fewer
@given(name=st.sampled_from(list(state_of('timm'))), bad=st.sampled_from([float('nan'), float('inf'), -float('inf')]))
def test_a_weight_that_is_not_finite_is_refused_by_its_parameters_name(suffix, name, bad, folder):
    state = state_of('timm')
    state[name].view(-1)[-1] = bad
    assert f'NaN or infinite values in {name}' in refusal(save(folder / f'nan{suffix}', state))


@pytest.mark.parametrize('dialect, name, timms', [
    ('dinov2', 'blocks.1.ls2.gamma', 'blocks.1.mlp.fc2'), ('moco_v3', 'module.base_encoder.norm.bias', 'norm.bias'),
    ('jax', 'Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias', 'blocks.1.attn.qkv.bias')])
def test_a_nan_in_a_dialect_is_refused_by_timms_name(dialect, name, timms, folder):
    state = state_of(dialect)
    state[name].view(-1)[0] = float('nan')
    assert f'NaN or infinite values in {timms}' in refusal(save(folder / 'nan.pth', state))


def test_a_double_too_large_for_single_precision_is_not_finite(folder):
    state = state_of('timm') | {'norm.bias': torch.full((8,), 1e300, dtype=torch.float64)}
    assert 'values in norm.bias' in refusal(save(folder / 'large.pth', state))


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.bool, torch.complex64])
@fewer
@given(name=st.sampled_from(list(state_of('timm'))))
def test_integers_and_complex_numbers_are_refused_by_name(dtype, name, folder):
    state = state_of('timm')
    said = refusal(save(folder / 'type.pth', state | {name: state[name].to(dtype)}))
    assert name == 'pos_embed' or f'not floating-point: {name}' in said


@pytest.mark.parametrize('dialect', [name for name in DIALECTS if name != 'safetensors'])
@fewer
@given(data=st.data())
def test_a_parameter_of_another_shape_is_refused_in_every_dialect(dialect, data, folder):
    """But a head is left out, positions on another grid are resampled, and what is dropped can be anything."""
    state = state_of(dialect)
    name = data.draw(st.sampled_from(list(state)))
    shape = data.draw(st.lists(st.integers(0, 12), max_size=5))
    assume(shape != list(state[name].shape))
    if load(save(folder / 'shape.pth', state | {name: torch.ones(shape)}))[0]:
        assert re.search('head|classifier|pos|mask_token|decoder|momentum_enc|predictor|pre_logits|pooler', name), (name, shape)


# ---- Downloads that go wrong ----------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torch hub's folder for checkpoints, empty."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    return tmp_path / 'home' / 'hub' / 'checkpoints'


@pytest.fixture
def server(whole):
    """A web server on this machine. Its attributes: what it sends, and how long it says that is (None: not at all)."""
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            if self.server.length is not None:
                self.send_header('Content-Length', str(self.server.length))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(self.server.content)

        def log_message(self, *args):
            pass
    web = HTTPServer(('127.0.0.1', 0), Handler)
    web.content, web.length = whole['.pth'], len(whole['.pth'])
    web.url = f'http://127.0.0.1:{web.server_port}'
    threading.Thread(target=web.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
    yield web
    web.shutdown()
    web.server_close()


def sha256(content):
    return vit.hashlib.sha256(content).hexdigest()


def test_a_download_says_its_size_before_it_starts(hub, server, caplog, monkeypatch):
    said, download = [], torch.hub.download_url_to_file
    monkeypatch.setattr(torch.hub, 'download_url_to_file',
                        lambda *args: (said.append(caplog.text), download(*args)))
    server.content = bytes(3_600_000)
    server.length = len(server.content)
    with caplog.at_level(logging.WARNING), pytest.raises(InputError):
        vit.load_weights(tiny(), f'{server.url}/zeros.pth')
    assert '(4 MB)' in said[0] and str(hub) in said[0]


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_checkpoint_comes_over_http_in_any_format(suffix, hub, server, whole):
    server.content, server.length = whole[suffix], len(whole[suffix])
    vit.load_weights(model := tiny(), f'{server.url}/a/weights{suffix}?download=true')
    assert same(model.state_dict()) and [file.name for file in hub.iterdir()] == [f'a_weights{suffix}']


def test_a_server_that_does_not_say_the_size_is_believed(hub, server, caplog):
    server.length = None
    with caplog.at_level(logging.WARNING):
        vit.load_weights(model := tiny(), f'{server.url}/weights.pth')
    assert same(model.state_dict()) and 'size unknown' in caplog.text


def test_a_download_that_stops_early_is_refused_and_nothing_is_kept(hub, server):
    """A connection that ends is no error to torch's download: half a file would be taken for a file for ever."""
    server.content = server.content[:5000]
    said = refusal(f'{server.url}/weights.pth')
    assert f'5000 of {server.length} bytes' in said and 'by hand' in said and not list(hub.iterdir())


@pytest.mark.parametrize('algorithm', ['md5', 'sha256'])
def test_a_checksum_behind_the_url_is_checked(algorithm, hub, server):
    digits = vit.hashlib.new(algorithm, server.content).hexdigest()
    for wrong in ('000000', digits[::-1], ''):
        assert 'weights.pth' in refusal(f'{server.url}/weights.pth#{algorithm}={wrong}') and not list(hub.iterdir())
    assert 'unsupported' in refusal(f'{server.url}/weights.pth#crc=1234') and not list(hub.iterdir())
    vit.load_weights(model := tiny(), f'{server.url}/weights.pth#{algorithm}={digits[:6]}')
    assert same(model.state_dict())


def test_a_checksum_in_a_name_of_torchs_style_is_checked(hub, server):
    assert 'invalid hash' in refusal(f'{server.url}/weights-00000000.pth') and not list(hub.iterdir())
    vit.load_weights(model := tiny(), f'{server.url}/weights-{sha256(server.content)[:8]}.pth')
    assert same(model.state_dict())
