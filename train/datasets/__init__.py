"""The embedded data set: a balanced subset of Fashion-MNIST's product photos, and the script that made it.

Fashion-MNIST is copyright 2017 Zalando SE, licence Expat (MIT); the notice is `FASHION_MNIST_LICENSE.txt` in this
folder. Source: https://github.com/zalandoresearch/fashion-mnist, paper arXiv 1708.07747.
"""

from pathlib import Path

SUBSET = Path(__file__).with_name("fashion_mnist_subset.npz")

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
