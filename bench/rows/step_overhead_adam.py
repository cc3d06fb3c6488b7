"""Row `step_overhead` with the default optimizer, Adam with decoupled weight decay; floor: torch.optim.AdamW."""
from _common import main
from step_overhead import floor as sgd_floor
from step_overhead import measure as sgd_measure


def measure(name: str) -> float: return sgd_measure(name, optimizer='Adam')
def floor() -> float: return sgd_floor('AdamW', weight_decay=0.01)


if __name__ == '__main__': main('µs', measure, floor)
