/* SPDX-License-Identifier: MIT */
/* The header block as it lies in an archive; for the reader and the writer only. */
#pragma once

#include "tar.h"

struct tar_header {
        char name[100];
        char mode[8];
        char uid[8];
        char gid[8];
        char size[12];
        char mtime[12];
        char checksum[8];
        char type;
        char link[100];
        char magic[6];
        char version[2];
        char user[32];
        char group[32];
        char major[8];
        char minor[8];
        char prefix[155];
        char pad[12];
};

_Static_assert(sizeof(struct tar_header) == TAR_BLOCK, "a tar header is one block");

#define PAX_XATTR "SCHILY.xattr."

unsigned tar_checksum(const struct tar_header *header);
