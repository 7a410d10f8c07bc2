# SPDX-License-Identifier: MIT
"""The thin kernel layer of the helper: one module per kernel interface, constants under their header names.

Functions raise OSError whose `filename` names the object. Used by the helper only.
"""
