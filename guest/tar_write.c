/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "tar_format.h"

enum { OCTAL_7_MAX = 07777777 };
#define OCTAL_11_MAX UINT64_C(077777777777)

struct pax {
        size_t used;
        bool full;
        char text[TAR_PAX_MAX];
};

/* The record's length counts its own digits. */
static size_t record_length(size_t rest) {
        size_t length = rest + 1;
        char digits[24];

        for (;;) {
                size_t next = rest + (size_t) snprintf(digits, sizeof digits, "%zu", length);

                if (next == length)
                        return length;
                length = next;
        }
}

static void pax_add(struct pax *pax, const char *prefix, const char *key, const void *value, size_t size) {
        size_t length = record_length(strlen(prefix) + strlen(key) + size + 3);
        int n;

        if (pax->full || length + 1 > sizeof pax->text - pax->used) {
                pax->full = true;
                return;
        }
        n = snprintf(pax->text + pax->used, length + 1, "%zu %s%s=", length, prefix, key);
        memcpy(pax->text + pax->used + n, value, size);
        pax->text[pax->used + length - 1] = '\n';
        pax->used += length;
}

static void pax_add_number(struct pax *pax, const char *key, uint64_t value) {
        char text[24];
        int n = snprintf(text, sizeof text, "%llu", (unsigned long long) value);

        pax_add(pax, "", key, text, (size_t) n);
}

/* A time before 1970 with a fraction counts down from the second above it. */
static void pax_add_mtime(struct pax *pax, const struct tar_entry *entry) {
        bool borrow = entry->mtime_s < 0 && entry->mtime_ns > 0;
        long long seconds = entry->mtime_s + borrow;
        unsigned ns = borrow ? 1000000000 - entry->mtime_ns : entry->mtime_ns;
        char text[40];
        int n = snprintf(text, sizeof text, "%s%lld.%09u", borrow && seconds == 0 ? "-" : "", seconds, ns);

        pax_add(pax, "", "mtime", text, (size_t) n);
}

static void collect_pax(const struct tar_entry *entry, struct pax *pax) {
        const char *name;
        const void *value;
        size_t cursor = 0, size;

        if (strlen(entry->path) > sizeof((struct tar_header *) 0)->name)
                pax_add(pax, "", "path", entry->path, strlen(entry->path));
        if (strlen(entry->link) > sizeof((struct tar_header *) 0)->link)
                pax_add(pax, "", "linkpath", entry->link, strlen(entry->link));
        if (entry->size > OCTAL_11_MAX)
                pax_add_number(pax, "size", entry->size);
        if (entry->uid > OCTAL_7_MAX)
                pax_add_number(pax, "uid", entry->uid);
        if (entry->gid > OCTAL_7_MAX)
                pax_add_number(pax, "gid", entry->gid);
        if (entry->mtime_s < 0 || (uint64_t) entry->mtime_s > OCTAL_11_MAX || entry->mtime_ns > 0)
                pax_add_mtime(pax, entry);
        while (xattrs_next(&entry->xattrs, &cursor, &name, &value, &size))
                pax_add(pax, PAX_XATTR, name, value, size);
}

static void put_octal(char *field, size_t size, uint64_t value) {
        for (size_t i = size - 1; i-- > 0; value >>= 3)
                field[i] = (char) ('0' + (value & 7));
        field[size - 1] = 0;
}

static uint64_t if_fits(uint64_t value, uint64_t max) {
        return value > max ? 0 : value;
}

static void put_header(struct tar_header *header, const struct tar_entry *entry, char type, uint64_t size) {
        uint64_t mtime = entry->mtime_s < 0 ? 0 : (uint64_t) entry->mtime_s;

        memset(header, 0, sizeof *header);
        memcpy(header->name, entry->path, min_size(strlen(entry->path), sizeof header->name));
        memcpy(header->link, entry->link, min_size(strlen(entry->link), sizeof header->link));
        put_octal(header->mode, sizeof header->mode, entry->mode & 07777);
        put_octal(header->uid, sizeof header->uid, if_fits(entry->uid, OCTAL_7_MAX));
        put_octal(header->gid, sizeof header->gid, if_fits(entry->gid, OCTAL_7_MAX));
        put_octal(header->size, sizeof header->size, if_fits(size, OCTAL_11_MAX));
        put_octal(header->mtime, sizeof header->mtime, if_fits(mtime, OCTAL_11_MAX));
        put_octal(header->major, sizeof header->major, entry->major);
        put_octal(header->minor, sizeof header->minor, entry->minor);
        header->type = type;
        memcpy(header->magic, "ustar", 6);
        memcpy(header->version, "00", 2);
        put_octal(header->checksum, 7, tar_checksum(header));
        header->checksum[7] = ' ';
}

int tar_write_zeros(uint64_t size, tar_sink sink, void *context) {
        static const uint8_t zeros[8 * TAR_BLOCK];

        while (size > 0) {
                size_t n = size > sizeof zeros ? sizeof zeros : (size_t) size;
                int r = sink(context, zeros, n);

                if (r < 0)
                        return r;
                size -= n;
        }
        return 0;
}

static int write_pax(const struct tar_entry *entry, const struct pax *pax, tar_sink sink, void *context) {
        struct tar_header header;
        int r;

        put_header(&header, entry, 'x', pax->used);
        r = sink(context, &header, sizeof header);
        if (r >= 0)
                r = sink(context, pax->text, pax->used);
        return r < 0 ? r : tar_write_zeros(tar_padding(pax->used), sink, context);
}

int tar_write_header(const struct tar_entry *entry, tar_sink sink, void *context) {
        static struct pax pax;
        struct tar_header header;
        int r;

        pax.used = 0;
        pax.full = false;
        collect_pax(entry, &pax);
        if (pax.full)
                return -EMSGSIZE;
        if (pax.used > 0) {
                r = write_pax(entry, &pax, sink, context);
                if (r < 0)
                        return r;
        }
        put_header(&header, entry, entry->type, entry->size);
        return sink(context, &header, sizeof header);
}

int tar_write_end(tar_sink sink, void *context) {
        return tar_write_zeros(2 * TAR_BLOCK, sink, context);
}
