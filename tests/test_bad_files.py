"""Files that are no images: raised, left out or replaced, the same with any number of workers, and all of them listed."""
import warnings

import pytest
import torch
from torch import nn

from lamella.vision.all import (CategoryBlock, DataBlock, DataError, DataLoader, ImageBlock, Learner, RandomSplitter, Resize,
    Transform, get_image_files, parent_label)

KW = dict(bs=4, device='cpu', seed=3)


@pytest.fixture
def damaged(photos):
    "Sixteen photos, three of them damaged: cut off, empty, and a text"
    (photos/'cat'/'3.jpg').write_bytes((photos/'cat'/'3.jpg').read_bytes()[:200])
    (photos/'dog'/'5.jpg').write_bytes(b'')
    (photos/'dog'/'6.jpg').write_text('not an image')
    return photos


def block(**kwargs):
    return DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, item_tfms=Resize(32), **{'splitter': RandomSplitter(0.25, seed=1), 'get_y': parent_label, **kwargs})


def loaders(path, on_error, workers=0, **kwargs):
    return block().dataloaders(path, on_error=on_error, num_workers=workers, **{**KW, 'drop_last': False, **kwargs})


def epochs(dl, n=2):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return [[x for x, y in dl] for _ in range(n)]


def same(a, b): return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


def test_raise_is_the_default(damaged):
    with pytest.raises(DataError, match=r'\d.jpg'): block().dataloaders(damaged, num_workers=0, **{**KW, 'bs': 16})


@pytest.mark.parametrize('on_error', ['skip', 'replace'])
def test_the_same_batches_with_any_number_of_workers(damaged, on_error):
    expected = epochs(loaders(damaged, on_error).train)
    assert not same(*expected)
    for workers in (1, 2):
        found = epochs(loaders(damaged, on_error, workers).train)
        assert same(found[0], expected[0]) and same(found[1], expected[1])


def test_skip_leaves_out_and_replace_fills_up(damaged):
    skipped, replaced = loaders(damaged, 'skip'), loaders(damaged, 'replace')
    bad = [str(o) for o in skipped.train_ds.items if str(o)[-9:] in ('cat/3.jpg', 'dog/5.jpg', 'dog/6.jpg')]
    training = [o for o in bad if o in map(str, skipped.train_ds.items)]
    assert training
    assert sum(map(len, epochs(skipped.train, 1)[0])) == 12 - len(training)
    assert [len(o) for o in epochs(replaced.train, 1)[0]] == [4, 4, 4]
    assert sorted(skipped.failed_items().file) == sorted(training)
    assert set(replaced.failed_items().file) == set(training)
    assert list(skipped.failed_items().columns) == ['file', 'reason', 'epoch', 'index', 'loader']


def test_replacements_are_of_the_same_split():
    "What a sampler leaves aside (the validation set, say) never comes in as a replacement"
    class Numbers:
        def __len__(self): return 100
        def __getitem__(self, i):
            if i % 4 == 0: raise OSError('truncated')
            return i
    dl = DataLoader(Numbers(), bs=10, sampler=torch.utils.data.SubsetRandomSampler(range(50)), num_workers=0, on_error='replace', seed=1)
    with pytest.warns(UserWarning, match='replaced'): seen = torch.cat(list(dl))
    assert len(seen) == 50 and seen.max() < 50 and (seen % 4 > 0).all()


def test_one_warning_an_epoch_names_the_files(damaged):
    dls = loaders(damaged, 'skip')
    with pytest.warns(UserWarning, match=r'(?s)of 12 samples could not be read in epoch 0 and were left out.*jpg: ') as caught: list(dls.train)
    assert len([o for o in caught if 'could not be read' in str(o.message)]) == 1
    first = len(dls.failures)
    with pytest.warns(UserWarning, match='in epoch 1'): list(dls.train)
    assert len(dls.failures) == 2 * first and {o.epoch for o in dls.failures} == {0, 1}


def test_a_batch_of_which_nothing_is_left_is_left_out(damaged):
    dls = loaders(damaged, 'skip', bs=1)
    found = epochs(dls.train, 1)[0]
    assert all(len(o) == 1 for o in found) and len(found) < len(dls.train) == 12


def test_nothing_but_bad_files_is_an_error_at_once(photos):
    for file in photos.rglob('*.jpg'): file.write_text('not an image')
    for on_error in ('skip', 'replace'):
        with pytest.raises(DataError, match='none of .* samples could be read'): loaders(photos, on_error)


def test_a_systematic_error_in_the_middle_of_training(damaged):
    dls = loaders(damaged, 'skip', bs=2)
    def explode(x): raise ZeroDivisionError('boom')
    dls.train.after_item.add(Transform(explode, order=99))
    with pytest.raises(DataError, match='none of 8 samples could be read(?s:.*)boom'): list(dls.train)


def split_off(items):
    "Files 6 to 8 are for validation"
    valid = [i for i, o in enumerate(items) if o.stem in '678']
    return [i for i in range(len(items)) if i not in valid], valid


def test_labels_and_getters_stay_errors(photos):
    def failing(path):
        if path.stem == '7': raise KeyError('no label for this file')
        return parent_label(path)
    def unknown(path): return 'bird' if path.stem == '7' else parent_label(path)
    for get_y, message in ((failing, 'no label for this file'), (unknown, 'bird')):
        with pytest.raises(DataError, match=message) as caught: block(get_y=get_y, splitter=split_off).dataloaders(photos, on_error='skip', num_workers=0, **KW)
        assert '7.jpg' in str(caught.value) and 'none of' not in str(caught.value)


def test_batches_that_do_not_fit_stay_errors(photos):
    from PIL import Image
    Image.new('RGB', (20, 20)).save(photos/'cat'/'1.jpg')
    odd = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(0.25, seed=1))
    with pytest.raises(DataError, match='different shapes'):
        for dl in odd.dataloaders(photos, on_error='skip', num_workers=0, **{**KW, 'bs': 16}): list(dl)


def learner(dls): return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), loss_func=nn.CrossEntropyLoss(), lr=1e-3)


def test_training_copes_with_batches_that_are_missing(damaged):
    learn = learner(loaders(damaged, 'skip', bs=1))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with learn.no_bar(): learn.fit_one_cycle(2, 1e-3)
        assert learn.pct_train == 1. and learn.train_iter == 24
        assert torch.isfinite(torch.tensor(learn.validate())).all()


def test_predictions_are_never_shifted(damaged):
    "With a file left out, prediction 7 would be that of item 8: an error instead"
    splitter = lambda items: (list(range(0, 16, 2)), list(range(1, 16, 2)))
    dls = block(splitter=splitter).dataloaders(damaged, on_error='skip', num_workers=0, **KW)
    learn = learner(dls)
    for k in range(2):
        with learn.no_bar(), pytest.raises(DataError, match=r'\d.jpg'): learn.get_preds(k)
    with learn.no_bar(), pytest.raises(DataError, match=r'5.jpg'): learn.get_preds(dl=dls.test_dl([damaged/'dog'/'5.jpg', damaged/'dog'/'1.jpg']))
    assert dls.test_dl([damaged/'dog'/'1.jpg']).on_error == 'raise'


def test_memory_errors_are_no_bad_files():
    class Full:
        def __len__(self): return 4
        def __getitem__(self, i): raise MemoryError('full')
    with pytest.raises(MemoryError): list(DataLoader(Full(), bs=2, num_workers=0, on_error='skip'))


def test_unknown_policy():
    with pytest.raises(ValueError, match="Did you mean 'skip'"): DataLoader([1, 2], on_error='skipp')
