# SPDX-License-Identifier: MIT
"""Reads a tar as it streams by: strictly, and quickly enough not to be what an image waits for.

`reader.entries` is the way in. It knows ustar, pax with global headers, GNU's long names, large numbers and
sparse files, and extended attributes and ACLs as GNU tar, star and container tools write them. Names are
bytes, as in a file system. Nothing that is claimed is believed before it is bounded, and what two readers
could take for two different things is refused.
"""
