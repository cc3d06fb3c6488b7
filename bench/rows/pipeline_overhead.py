"""What a transform call costs in a pipeline of five on one sample (a number and its label), beyond calling the five functions by hand."""
from _common import library, main, median_seconds, prepare

CALLS, STEPS = 2000, 5


def make_transforms(vision) -> list:
    "Five transforms of numbers that leave the label alone; none of them does any work"
    class Step(vision.Transform):
        def encodes(self, x: float): return x
    return [type(f'Step{k}', (Step,), {})() for k in range(STEPS)]


def microseconds(work) -> float:
    "The time of a call of `work`, the median of repeated runs"
    def run():
        for _ in range(CALLS): work()
    return 1e6 * median_seconds(run, calls=15, warm_up=2) / CALLS


def by_hand(sample: tuple):
    "The five functions on the number"
    def step(x): return x
    def work():
        x = sample[0]
        for _ in range(STEPS): x = step(x)
        return x, sample[1]
    return work


def measure(name: str) -> float:
    "Microseconds a transform call, without those of a function call"
    vision = library(name)
    prepare()
    sample = 1.5, 'cat'
    pipe = vision.Pipeline(make_transforms(vision))
    return (microseconds(lambda: pipe(sample)) - microseconds(by_hand(sample))) / STEPS


if __name__ == '__main__': main('µs', measure)
