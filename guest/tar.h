/* SPDX-License-Identifier: MIT */
/* Tar archives as streams: ustar, pax headers and GNU long names. No files are touched here. */
#pragma once

#include <limits.h>
#include <stdbool.h>
#include <sys/types.h>

#include "macro.h"

enum {
        TAR_BLOCK = 512,
        TAR_PAX_MAX = 256 * 1024,
        TAR_XATTRS_MAX = 128 * 1024,
};

enum tar_type {
        TAR_FILE = '0',
        TAR_HARDLINK = '1',
        TAR_SYMLINK = '2',
        TAR_CHARACTER = '3',
        TAR_BLOCK_DEVICE = '4',
        TAR_DIRECTORY = '5',
        TAR_FIFO = '6',
};

/* Extended attributes packed one after another: name, terminator, u32 size in native order, value. */
struct xattrs {
        size_t used;
        uint8_t data[TAR_XATTRS_MAX];
};

struct tar_entry {
        char type;
        mode_t mode;
        uid_t uid;
        gid_t gid;
        unsigned major, minor;
        uint64_t size;
        int64_t mtime_s;
        uint32_t mtime_ns;
        char path[PATH_MAX];
        char link[PATH_MAX];
        struct xattrs xattrs;
};

int xattrs_add(struct xattrs *xattrs, const char *name, size_t name_size, const void *value, size_t size);
/* Start with *cursor = 0; returns false at the end. */
bool xattrs_next(const struct xattrs *xattrs, size_t *cursor, const char **ret_name, const void **ret_value,
                 size_t *ret_size);

/* Gives at most max bytes that follow each other in memory; *ret_size 0 is the end of the stream. */
typedef int (*tar_source)(void *context, size_t max, const uint8_t **ret_data, size_t *ret_size);

struct tar_reader {
        tar_source source;
        void *context;
        uint64_t left;    /* of the current member's content */
        uint64_t padding; /* behind it */
        uint8_t pax[TAR_PAX_MAX + 1];
};

/* Returns 1 with a member, 0 behind the last, -EBADMSG for what is no archive, -EOPNOTSUPP for what we do not know. */
int tar_next(struct tar_reader *reader, struct tar_entry *ret);
/* A piece of the member's content; *ret_size 0 behind its end. */
int tar_content(struct tar_reader *reader, const uint8_t **ret_data, size_t *ret_size);
/* Reads the stream to its end behind the last member. */
int tar_finish(struct tar_reader *reader);

typedef int (*tar_sink)(void *context, const void *data, size_t size);

/* Writes a member's headers. The content and its padding are the caller's to send. */
int tar_write_header(const struct tar_entry *entry, tar_sink sink, void *context);
int tar_write_end(tar_sink sink, void *context);
int tar_write_zeros(uint64_t size, tar_sink sink, void *context);
uint64_t tar_padding(uint64_t size);
