"""Everything that changes between releases lives in settings.ini; this file only reads it."""
import os
from configparser import ConfigParser
from pathlib import Path

from setuptools import Extension, find_packages, setup

here = Path(__file__).parent
settings = ConfigParser()
settings.read(here/'settings.ini', encoding='utf-8')
project = settings['DEFAULT']
extras = {name: value.split() for name, value in settings.items('extras') if name not in settings.defaults()}

# Faster, and optional: where there is no compiler, or no libjpeg-turbo to compile with, lamella is installed without them.
# A product and a sum are rounded one after the other, as PyTorch and NumPy do it, whatever CFLAGS allow.
fast = {'extra_compile_args': [] if os.name == 'nt' else ['-O3', '-ffp-contract=off'], 'optional': True}
extensions = [Extension('lamella.vision._jpeg', ['lib/lamella/vision/_jpeg.c'], libraries=['jpeg'], **fast),
              Extension('lamella.vision._pixels', ['lib/lamella/vision/_pixels.c'], **fast),
              Extension('lamella.vision._sampling', ['lib/lamella/vision/_sampling.c'], **fast)]

setup(
    name=project['lib_name'], version=project['version'], description=project['description'],
    author=project['author'], license=project['license'], keywords=project['keywords'].split(),
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    package_dir={'': 'lib'}, packages=find_packages('lib'), package_data={'lamella': ['assets/*', 'py.typed']},
    python_requires=f">={project['min_python']}", install_requires=project['requirements'].split(),
    extras_require=extras, entry_points={'console_scripts': project['console_scripts'].split()}, zip_safe=False,
    ext_modules=extensions)
