"""Faults that a review of deployment found: what is wrong with a file is one line, and the other files are predicted."""
import json
import sys

import numpy as np
import pytest
from PIL import Image

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from lamella.export.onnx_predict import OnnxPredictor, main

SAID = {'version': 1, 'input': {'dtype': 'uint8', 'white': 255.}, 'preprocessing': [{'step': 'open', 'mode': 'L'}], 'targets': [{'task': None, 'classes': None, 'decision': None, 'axis': None}]}


def model(path, **metadata: str):
    "A graph that gives its input"
    shape = ['n', 1, 'h', 'w']
    made = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, shape) for name in ('images', 'output')]
    graph = onnx.helper.make_graph([onnx.helper.make_node('Identity', ['images'], ['output'])], 'same', made[:1], made[1:])
    whole = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 18)], ir_version=9)
    onnx.helper.set_model_props(whole, metadata)
    onnx.save(whole, path)
    return path


@pytest.fixture
def right(tmp_path): return model(tmp_path/'right.onnx', lamella=json.dumps(SAID))


def wrong_files(folder, right):
    "Of each kind, and what is said of it"
    for name, data in (('text', b'hello'), ('empty', b''), ('half', right.read_bytes()[:-200])): (folder/f'{name}.onnx').write_bytes(data)
    model(folder/'foreign.onnx', author='somebody')
    model(folder/'other.onnx', lamella='{}')
    model(folder/'damaged.onnx', lamella='{"version": ')
    model(folder/'newer.onnx', lamella=json.dumps({**SAID, 'version': 2}))
    return {'text': 'cannot be opened as an ONNX file', 'empty': 'cannot be opened', 'half': 'cannot be opened', 'foreign': 'not written by to_onnx', 'other': 'not written by to_onnx',
            'damaged': 'metadata of .* is damaged', 'newer': 'newer lamella', 'missing': 'is no file'}


def test_wrong_files(tmp_path, right, capsys):
    "Sixteen lines of a traceback, and none of them named the fault"
    for name, words in wrong_files(tmp_path, right).items():
        with pytest.raises((ValueError, FileNotFoundError), match=words): OnnxPredictor(tmp_path/f'{name}.onnx')
        assert main([str(tmp_path/f'{name}.onnx'), 'a.png']) == 1
        said = capsys.readouterr()
        assert said.out == '' and said.err.startswith('Error: ') and said.err.count('\n') == 1 and f'{name}.onnx' in said.err


def test_one_wrong_picture(tmp_path, right, capsys):
    "It ended all that came after it"
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(pixels).save(tmp_path/'a.png')
    (tmp_path/'text.png').write_text('milk')
    names = [str(tmp_path/o) for o in ('a.png', 'text.png', 'missing.png', 'a.png')]
    assert main([str(right), *names]) == 1
    found = [json.loads(o) for o in capsys.readouterr().out.splitlines()]
    assert [o['file'] for o in found] == names and ['error' in o for o in found] == [False, True, True, False]
    assert found[3]['outputs'] == [pixels.tolist()] and 'missing.png' in found[2]['error']
    assert main([str(right), names[0]]) == 0


def test_without_onnxruntime(right, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r"pip install 'lamella\[onnx\]'"): OnnxPredictor(right)
