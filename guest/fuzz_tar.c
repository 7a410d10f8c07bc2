/* SPDX-License-Identifier: MIT */
/* Any bytes as an archive. What is read as a member is written again and must read the same. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "beneath.h"
#include "tar.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct buffer {
        const uint8_t *data;
        size_t size, used;
};

static uint8_t written[1024 * 1024];

static int take(void *context, size_t max, const uint8_t **ret_data, size_t *ret_size) {
        struct buffer *buffer = context;
        size_t piece = 1 + buffer->used % 700; /* pieces of all lengths, as frames have */

        *ret_size = min_size(min_size(max, piece), buffer->size - buffer->used);
        *ret_data = buffer->data + buffer->used;
        buffer->used += *ret_size;
        return 0;
}

static int keep(void *context, const void *data, size_t size) {
        struct buffer *buffer = context;

        if (size > sizeof written - buffer->used)
                return -ENOSPC;
        memcpy(written + buffer->used, data, size);
        buffer->used += size;
        return 0;
}

static void check_same(const struct tar_entry *one, const struct tar_entry *other) {
        if (one->type != other->type || one->mode != other->mode || one->uid != other->uid ||
            one->gid != other->gid || one->size != other->size || one->mtime_s != other->mtime_s ||
            one->mtime_ns != other->mtime_ns || strcmp(one->path, other->path) != 0 ||
            strcmp(one->link, other->link) != 0 || one->xattrs.used != other->xattrs.used ||
            memcmp(one->xattrs.data, other->xattrs.data, one->xattrs.used) != 0)
                abort();
}

static void write_again(const struct tar_entry *entry) {
        static struct tar_reader reader;
        static struct tar_entry again;
        struct buffer out = { 0 };

        if (tar_write_header(entry, keep, &out) < 0)
                abort();
        out = (struct buffer) { .data = written, .size = out.used };
        reader.source = take;
        reader.context = &out;
        reader.left = reader.padding = 0;
        if (tar_next(&reader, &again) != 1)
                abort();
        check_same(entry, &again);
}

/* What passes the check has no component that leads upwards. */
static void check_path(struct tar_entry *entry) {
        if (path_normalize(entry->path) < 0)
                return;
        if (entry->path[0] == '/' || strcmp(entry->path, "..") == 0 || strncmp(entry->path, "../", 3) == 0 ||
            strstr(entry->path, "/../") || strstr(entry->path, "//"))
                abort();
        (void) path_strip(entry->path, 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
        static struct tar_reader reader;
        static struct tar_entry entry;
        struct buffer in = { .data = data, .size = size };

        reader.source = take;
        reader.context = &in;
        reader.left = reader.padding = 0;
        while (tar_next(&reader, &entry) == 1) {
                const uint8_t *piece;
                size_t n;

                write_again(&entry);
                while (tar_content(&reader, &piece, &n) == 0 && n > 0)
                        ;
                check_path(&entry);
        }
        return 0;
}
