"""A plugin of pytest that imports the module that ``IMPORT_FIRST`` names before any test is collected."""

import importlib
import os

importlib.import_module(os.environ["IMPORT_FIRST"])
