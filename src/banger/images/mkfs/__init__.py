# SPDX-License-Identifier: MIT
"""Makes ext4 file systems in files, without mounting them, without root, and while the content arrives.

`filesystem.Filesystem` is the only way in. The content of files goes straight to where it will stay; names
and inodes are kept packed in memory (about 90 bytes a file) and are written at the end, when the size is
known. Nothing is written that reads as zeros anyway, so the file is as sparse as its content.

The features, and why:

- `extent`, `flex_bg`: runs of any length, metadata wherever there is room. So content can be laid down
  before anyone knows how large the file system will be, and what it needs itself comes after it. Only the
  places of the superblocks and descriptors (`sparse_super`) are fixed; content keeps off those that the
  largest file system could have, and what is not needed of them becomes free at the end.
- `uninit_bg` (`gdt_csum`): descriptors with a checksum can say that a group is untouched. Its bitmaps and
  inode table need not be written, nor read by e2fsck. Every inode table is marked as zeroed: a sparse file
  is, and no guest shall spend its first minutes on writing zeros into its overlay.
- no `metadata_csum`: it would put a CRC of each inode and directory block into the way, and protects
  nothing that the layers below a guest's disk do not; a guest's e2fsck can add it (`tune2fs -O`).
- no `64bit`: 16 TiB are enough, and descriptors are half as large. No `resize_inode`: it reserves blocks for
  descriptors of a larger file system; without it resize2fs moves what is in the way, and nothing is until a
  disk grows over a multiple of 16 GiB.
- `has_journal`, of the size that mke2fs would choose; of an empty one a single block is written.
- `dir_index` with half MD4, `filetype`, `dir_nlink`, `huge_file`, `large_file`, `extra_isize`, `ext_attr`:
  as everywhere. Inodes have 256 bytes: times in nanoseconds until 2310, small extended attributes inside.

Linux has all of this since 2.6.28.
"""
