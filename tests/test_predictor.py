"""`predict` of everything that people have, by a learner and by what was exported of it: the same predictions, in order, in any number of threads and processes."""
import json
import multiprocessing
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastcore.foundation import L
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from lamella.data.pipeline import DataError
from lamella.export import load_learner
from lamella.vision.all import (ColReader, CategoryBlock, DataBlock, ImageBlock, ImageDataLoaders, Learner, MaskBlock, MultiCategoryBlock, PointBlock,
                                RegressionBlock, Resize, TensorPoint, get_image_files, parent_label)

SIZES = [(40, 30), (30, 40), (64, 20), (33, 33), (20, 64), (48, 36)]


class Number:
    "What a file's name says of it"
    def __call__(self, file): return int(Path(file).stem)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Pictures of different sizes in two folders, with numbers as names"
    root, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for i in range(24):
        w, h = SIZES[i % len(SIZES)]
        file = root/('cat', 'dog')[i % 2]/f'{i:02}.png'
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(file)
    return list(get_image_files(root))


def make_learner(task, files, folder):
    "A tiny network with random weights"
    number = Number()
    masks = lambda o: Image.new('L', Image.open(o).size, number(o) % 3)
    points = lambda o: TensorPoint.create([[1. + number(o) % 5, 2.]])
    block, label, n = {
        'classification': (CategoryBlock, parent_label, 2), 'multi-label': (MultiCategoryBlock(vocab=['a', 'b', 'c']), lambda o: ['a'] if number(o) % 2 else ['b', 'c'], 3),
        'regression': (RegressionBlock(n_out=2), lambda o: [number(o) / 10, 1.], 2), 'points': (PointBlock, points, 2), 'segmentation': (MaskBlock(['sky', 'road', 'car']), masks, 3)}[task]
    dls = DataBlock(blocks=(ImageBlock, block), get_y=label, item_tfms=Resize(24)).dataloaders(files, bs=4, num_workers=0, device='cpu')
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]
    head = [nn.Conv2d(4, n, 1)] if task == 'segmentation' else [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, n)]
    return Learner(dls, nn.Sequential(*body, *head), path=folder)


TASKS = ['classification', 'multi-label', 'regression', 'points', 'segmentation']


@pytest.fixture(scope='module')
def pairs(files, tmp_path_factory):
    "A learner and what was exported of it, made once for each task"
    made = {}
    def _make(task):
        if task not in made:
            torch.manual_seed(0)
            learn = make_learner(task, files, tmp_path_factory.mktemp('learner'))
            made[task] = learn, load_learner(learn.export('model.pkl'))
        return made[task]
    return _make


def numbers(prediction):
    "All of a prediction, in a form that can be compared bit for bit"
    label = prediction.label
    label = label.tolist() if isinstance(label, torch.Tensor) else str(label)
    return label, prediction[1].tolist(), prediction[2].tolist()


def forms(file):
    "One picture in all forms"
    image = Image.open(file).convert('RGB')
    array = np.asarray(image)
    return {'path': file, 'str': str(file), 'bytes': file.read_bytes(), 'pil': image, 'array': array, 'tensor': torch.from_numpy(array.copy()).permute(2, 0, 1), 'open file': open(file, 'rb')}


@pytest.mark.parametrize('task', TASKS)
def test_one_picture_in_all_forms_by_learner_and_file(task, files, pairs):
    learn, predictor = pairs(task)
    assert predictor.task == learn.dls.task == task
    wanted = numbers(learn.predict(files[2]))
    for name, x in forms(files[2]).items(): assert numbers(predictor.predict(x)) == wanted, name
    for name, x in forms(files[2]).items(): assert numbers(learn.predict(x)) == wanted, name
    assert json.loads(json.dumps(predictor.predict(files[2]).to_dict(), allow_nan=False)) == learn.predict(files[2]).to_dict()


@pytest.mark.parametrize('task', TASKS)
def test_many_in_all_forms_by_learner_and_file(task, files, pairs):
    learn, predictor = pairs(task)
    root, wanted = files[0].parent.parent, [numbers(o) for o in learn.predict(files, bs=4)]
    for bunch in (files, L(files), iter(files), np.array([str(o) for o in files]), root, str(root), f'{root}/*/*.png', pd.Series(files)):
        for model in (learn, predictor) if not hasattr(bunch, '__next__') else (predictor,):
            found = model.predict(bunch, bs=4)
            assert [numbers(o) for o in found] == wanted and len(found.items) == len(files)
    assert [numbers(o) for o in predictor.predict([file.read_bytes() for file in files], bs=4)] == wanted
    assert [numbers(o) for o in predictor.predict(predictor.dls.test_dl(files, bs=4, num_workers=0))] == wanted
    assert [numbers(o) for o in learn.predict(learn.dls.test_dl(files, bs=4, num_workers=0))] == wanted
    assert len(predictor.predict(files, bs=4).to_frame()) == len(files)


@pytest.mark.parametrize('task', ['classification', 'points', 'segmentation'])
def test_a_single_one_says_what_one_of_many_says(task, files, pairs):
    "Up to the last bits of a batch of another size"
    _, predictor = pairs(task)
    for one, of_many in zip(map(predictor.predict, files), predictor.predict(files, bs=5)):
        for a, b in zip(one, of_many):
            if isinstance(a, torch.Tensor): torch.testing.assert_close(a.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor))


def test_points_are_in_pixels_of_the_picture_that_was_opened(files, tmp_path):
    "Each picture has a point at its middle, and the network says so: whatever it is cropped to, and whoever reads it"
    learn = make_learner('points', files, tmp_path)
    nn.init.zeros_(learn.model[-1].weight), nn.init.zeros_(learn.model[-1].bias)
    predictor = load_learner(learn.export('model.pkl'))
    for found in (predictor.predict(files, num_workers=0), predictor.predict(files, bs=7, num_workers=2)):
        for file, o in zip(files, found): np.testing.assert_allclose(o.to_dict()['points'], [[s / 2 for s in Image.open(file).size]], atol=1e-4)


def test_processes_give_what_one_process_gives(files, pairs):
    for task in ('classification', 'points'):
        _, predictor = pairs(task)
        alone, others = (predictor.predict(files, bs=5, num_workers=n) for n in (0, 2))
        assert [numbers(o) for o in alone] == [numbers(o) for o in others]
        preds = predictor.get_preds(dl=predictor.dls.test_dl(files, bs=5, num_workers=2))[0]
        assert torch.equal(preds, torch.stack([o[2] for o in alone]))


def test_get_preds_of_the_file_are_those_of_the_learner(files, pairs):
    "As programs for fastai write it"
    for task in TASKS:
        learn, predictor = pairs(task)
        inputs, preds, targets, decided = predictor.get_preds(dl=predictor.dls.test_dl(files, bs=4, num_workers=0), with_input=True, with_decoded=True)
        theirs = learn.get_preds(dl=learn.dls.test_dl(files, bs=4, num_workers=0), with_input=True, with_decoded=True)
        assert targets is None and theirs[2] is None
        assert all(torch.equal(a, b) for a, b in zip((inputs, preds, decided), (theirs[0], theirs[1], theirs[3])))
    assert predictor.dls.vocab == learn.dls.vocab and predictor.dls.device == learn.dls.device
    validation = [torch.as_tensor(o) for o in learn.get_preds()]
    assert all(torch.equal(a, b) for a, b in zip(predictor.get_preds(dl=learn.dls.valid), validation))


def test_loaders_of_pytorch(files, pairs):
    _, predictor = pairs('classification')
    inputs, preds, _ = predictor.get_preds(dl=predictor.dls.test_dl(files, num_workers=0), with_input=True)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, torch.zeros(len(inputs))), batch_size=7)
    found = predictor.predict(dl)
    torch.testing.assert_close(torch.stack([o[2] for o in found]), preds)
    assert [o.label for o in found] == [predictor.vocab[i] for i in preds.argmax(1)] and list(found.items) == list(range(len(files)))


def test_rows_of_a_table(files, tmp_path):
    "The columns that the getters name are read by the file, too"
    root = files[0].parent.parent
    table = pd.DataFrame({'name': [o.relative_to(root).as_posix() for o in files], 'label': [o.parent.name for o in files]}, index=[f'row {i}' for i in range(len(files))])
    learn = Learner(ImageDataLoaders.from_df(table, root, item_tfms=Resize(24), bs=4, num_workers=0, device='cpu'), make_learner('classification', files, tmp_path).model, path=tmp_path)
    predictor = load_learner(learn.export('model.pkl'))
    wanted = [numbers(o) for o in learn.predict(files, bs=4)]
    for model in (learn, predictor):
        assert [numbers(o) for o in model.predict(table, bs=4)] == wanted
        assert numbers(model.predict(table.iloc[0])) == numbers(model.predict([table.iloc[0]])[0]) == numbers(model.predict(files[0]))
    found = predictor.predict(table[['name']]).to_frame()
    assert found.item.tolist() == table.index.tolist() and found.columns.tolist() == ['item', 'label', 'probability', 'cat', 'dog']


class OfPairs(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Linear(2, 2)
    def forward(self, a, b): return self.fc(torch.stack([a.float(), b.float()], 1))


@pytest.mark.parametrize('kind', [tuple, list])
def test_items_that_are_tuples_or_lists(kind):
    "A tuple is one item, a list is many: whatever the items of the model are"
    from lamella.vision.all import TransformBlock
    items = [kind((i, i % 3)) for i in range(12)]
    dls = DataBlock(blocks=(TransformBlock, TransformBlock, CategoryBlock), n_inp=2, get_x=[lambda o: o[0], lambda o: o[1]], get_y=lambda o: str(o[0] % 2)).dataloaders(items, bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, OfPairs())
    found = learn.predict(items[:3])
    assert [o[2].tolist() for o in found] == learn.get_preds(dl=learn.dls.test_dl(items[:3]))[0].tolist()
    if kind is tuple: torch.testing.assert_close(learn.predict(items[1])[2], found[1][2])
    else: torch.testing.assert_close(learn.predict([items[1]])[0][2], found[1][2])


def test_arrays_of_floats_and_of_one_channel(files, pairs):
    _, predictor = pairs('classification')
    array = np.asarray(Image.open(files[0]))
    assert numbers(predictor.predict(array.astype(np.float32) / 255)) == numbers(predictor.predict(array))
    grey = array[..., 0]
    assert numbers(predictor.predict(grey)) == numbers(predictor.predict(np.stack([grey] * 3, -1)))
    with pytest.raises(DataError, match='values from 0 to 1'): predictor.predict(array.astype(np.float32))
    with pytest.raises(DataError, match='height, width'): predictor.predict(array[None])


# ---- what goes wrong

def test_folders_and_patterns_without_files(tmp_path, pairs):
    for model in pairs('classification'):
        with pytest.raises(FileNotFoundError, match='no pictures in the folder'): model.predict(tmp_path)
        with pytest.raises(FileNotFoundError, match='no files like'): model.predict(str(tmp_path/'*.png'))
        with pytest.raises(DataError, match='nothing.png'): model.predict(tmp_path/'nothing.png')
        assert model.predict([]) == [] and len(model.predict([]).to_frame()) == 0


@pytest.mark.parametrize('workers', [0, 2])
def test_a_file_in_the_middle_that_cannot_be_read(workers, files, pairs, tmp_path):
    bad = tmp_path/'bad.png'
    bad.write_bytes(files[0].read_bytes()[:200])
    given = [*files[:3], bad, *files[3:6]]
    for model in pairs('classification'):
        with pytest.raises(DataError, match=r'item 3 \(.*bad.png\) could not be read'): model.predict(given, bs=2, num_workers=workers)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            found = model.predict(given, bs=2, num_workers=workers, on_error='skip')
        assert found.items == files[:6] and [Path(o.file).name for o in found.failures] == ['bad.png']
        assert [o.label for o in found] == [o.label for o in model.predict(files[:6])]
    with pytest.raises(ValueError, match="'raise' or 'skip'"): model.predict(given, on_error='ignore')
    assert model.predict([bad], on_error='skip') == []


def test_with_input(files, pairs):
    learn, _ = pairs('classification')
    image, *three = learn.predict(files[0], with_input=True)
    assert image.shape == (3, 24, 24) and len(three) == 3
    with pytest.raises(ValueError, match='with_input=True is for one item'): learn.predict(files[:2], with_input=True)


# ---- nothing is changed, nothing is said

def test_predict_is_silent_and_leaves_random_states_and_modes(files, pairs, capsys):
    for task in ('classification', 'points'):
        for model in pairs(task):
            model.model.train()
            before = torch.get_rng_state(), np.random.get_state()[1].tolist()
            model.predict(files[0]), model.predict(files, bs=4, num_workers=0)
            assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
            assert all(o.training for o in model.model.modules())
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('task', ['classification', 'points'])
def test_eight_threads_give_what_one_gives(task, files, pairs):
    "Resize notes the size of its picture, and the mode of a learner's model is changed for a prediction: both are no matter of other threads"
    for model in pairs(task):
        model.model.train()
        wanted = [numbers(model.predict(o)) for o in files]
        many = [numbers(o) for o in model.predict(files, bs=3, num_workers=0)]
        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(model.predict, o) for _ in range(6) for o in files]
            lists = [pool.submit(model.predict, files, bs=3, num_workers=0) for _ in range(8)]
            assert [numbers(o.result()) for o in found] == wanted * 6
            assert all([numbers(p) for p in o.result()] == many for o in lists)
        assert all(o.training for o in model.model.modules())


def _predict_in_daemon(file, files, queue):
    torch.set_num_threads(1)
    predictor = load_learner(file)
    queue.put([o.label for o in predictor.predict(files * 4, bs=16)])
    queue.put([o.label for o in predictor.predict(predictor.dls.test_dl(files * 4, bs=16))])


def test_processes_that_may_have_no_children(files, pairs):
    learn, _ = pairs('classification')
    queue = multiprocessing.get_context('spawn').Queue()
    process = multiprocessing.get_context('spawn').Process(target=_predict_in_daemon, args=(learn.path/'model.pkl', files, queue), daemon=True)
    process.start()
    wanted = [o.label for o in learn.predict(files)] * 4
    assert queue.get(timeout=120) == wanted and queue.get(timeout=120) == wanted
    process.join()


# ---- any order, any size of batches

@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.lists(st.integers(0, 23), max_size=20), bs=st.integers(1, 9), as_bytes=st.lists(st.booleans(), min_size=20, max_size=20))
def test_the_order_is_that_of_the_items(chosen, bs, as_bytes, files, pairs):
    for task in ('classification', 'points'):
        _, predictor = pairs(task)
        singles = _singles(predictor, files)
        items = [files[i].read_bytes() if raw else files[i] for i, raw in zip(chosen, as_bytes)]
        found = predictor.predict(items, bs=bs)
        assert len(found) == len(items) and found.items == items
        for i, o in zip(chosen, found): torch.testing.assert_close(o[2], singles[i][2])


_found = {}


def _singles(predictor, files):
    if predictor not in _found: _found[predictor] = [predictor.predict(o) for o in files]
    return _found[predictor]


@pytest.mark.parametrize('bs, workers', [(1, 2), (5, 1), (6, 3)])
def test_the_order_with_processes(bs, workers, files, pairs):
    _, predictor = pairs('points')
    chosen = [5, 3, 3, 20, 1, 0, 17, 11, 23, 2, 2]
    singles, found = _singles(predictor, files), predictor.predict([files[i] for i in chosen], bs=bs, num_workers=workers)
    for i, o in zip(chosen, found): torch.testing.assert_close(o.label.as_subclass(torch.Tensor), singles[i].label.as_subclass(torch.Tensor))
