/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io.h"
#include "tar_format.h"

/* Far beyond what a file system can hold, and safe to calculate with. */
#define MTIME_MAX (INT64_MAX / 100)

/* What pax and GNU headers say about the member behind them. */
struct overrides {
        bool path, link, size, mtime, uid, gid;
};

int xattrs_add(struct xattrs *xattrs, const char *name, size_t name_size, const void *value, size_t size) {
        uint32_t stored = (uint32_t) size;
        uint8_t *p = xattrs->data + xattrs->used;

        if (size > sizeof xattrs->data || name_size > sizeof xattrs->data - size ||
            name_size + 1 + sizeof stored + size > sizeof xattrs->data - xattrs->used)
                return -EMSGSIZE;
        memcpy(p, name, name_size);
        p[name_size] = 0;
        memcpy(p + name_size + 1, &stored, sizeof stored);
        memcpy(p + name_size + 1 + sizeof stored, value, size);
        xattrs->used += name_size + 1 + sizeof stored + size;
        return 0;
}

bool xattrs_next(const struct xattrs *xattrs, size_t *cursor, const char **ret_name, const void **ret_value,
                 size_t *ret_size) {
        const uint8_t *p = xattrs->data + *cursor;
        size_t name_size;
        uint32_t size;

        if (*cursor >= xattrs->used)
                return false;
        name_size = strlen((const char *) p);
        memcpy(&size, p + name_size + 1, sizeof size);
        *ret_name = (const char *) p;
        *ret_value = p + name_size + 1 + sizeof size;
        *ret_size = size;
        *cursor += name_size + 1 + sizeof size + size;
        return true;
}

unsigned tar_checksum(const struct tar_header *header) {
        const uint8_t *bytes = (const uint8_t *) header;
        size_t first = offsetof(struct tar_header, checksum);
        unsigned sum = 0;

        for (size_t i = 0; i < sizeof *header; i++)
                sum += i >= first && i < first + sizeof header->checksum ? ' ' : bytes[i];
        return sum;
}

/* Returns how much there was: less than size at the end of the stream. */
static ssize_t read_bytes(struct tar_reader *reader, void *target, size_t size) {
        size_t done = 0;

        while (done < size) {
                const uint8_t *data;
                size_t n;
                int r = reader->source(reader->context, size - done, &data, &n);

                if (r < 0)
                        return r;
                if (n == 0)
                        break;
                memcpy((uint8_t *) target + done, data, n);
                done += n;
        }
        return (ssize_t) done;
}

static int read_exactly(struct tar_reader *reader, void *target, size_t size) {
        ssize_t n = read_bytes(reader, target, size);

        if (n < 0)
                return (int) n;
        return (size_t) n < size ? -EBADMSG : 0;
}

static int skip_bytes(struct tar_reader *reader, uint64_t size) {
        while (size > 0) {
                const uint8_t *data;
                size_t n;
                int r = reader->source(reader->context, size > INT_MAX ? INT_MAX : (size_t) size, &data, &n);

                if (r < 0)
                        return r;
                if (n == 0)
                        return -EBADMSG;
                size -= n;
        }
        return 0;
}

uint64_t tar_padding(uint64_t size) {
        return (TAR_BLOCK - size % TAR_BLOCK) % TAR_BLOCK;
}

/* GNU writes numbers that do not fit in octal as big-endian binary with the first bit set. */
static int parse_binary(const uint8_t *field, size_t size, int64_t *ret) {
        bool negative = field[0] & 0x40;
        uint64_t value = negative ? UINT64_MAX : 0;

        for (size_t i = 0; i < size; i++) {
                uint8_t byte = i > 0 ? field[i] : negative ? field[0] : field[0] & 0x3f;
                uint8_t lost = (uint8_t) (value >> 56);

                if (lost != (negative ? 0xff : 0))
                        return -EBADMSG;
                value = value << 8 | byte;
        }
        if ((value >> 63 != 0) != negative)
                return -EBADMSG;
        *ret = (int64_t) value;
        return 0;
}

static int parse_octal(const char *field, size_t size, int64_t *ret) {
        uint64_t value = 0;
        size_t i = 0;

        while (i < size && field[i] == ' ')
                i++;
        for (; i < size && field[i] >= '0' && field[i] <= '7'; i++)
                value = value << 3 | (uint64_t) (field[i] - '0');
        if (i < size && field[i] != 0 && field[i] != ' ')
                return -EBADMSG;
        *ret = (int64_t) value; /* at most 12 digits */
        return 0;
}

static int parse_number(const char *field, size_t size, int64_t max, int64_t *ret) {
        int r = (uint8_t) field[0] & 0x80 ? parse_binary((const uint8_t *) field, size, ret)
                                          : parse_octal(field, size, ret);

        if (r < 0)
                return r;
        return *ret < 0 || *ret > max ? -EBADMSG : 0;
}

static int take_name(char *target, const char *text, size_t size) {
        size = strnlen(text, size);
        if (size >= PATH_MAX)
                return -ENAMETOOLONG;
        memcpy(target, text, size);
        target[size] = 0;
        return 0;
}

static int take_header_path(const struct tar_header *header, char *target) {
        size_t prefix = memcmp(header->magic, "ustar\0", 6) == 0 ? strnlen(header->prefix, sizeof header->prefix) : 0;

        memcpy(target, header->prefix, prefix);
        if (prefix > 0)
                target[prefix++] = '/';
        return take_name(target + prefix, header->name, sizeof header->name);
}

static int take_mtime(const struct tar_header *header, struct tar_entry *entry) {
        int r;

        entry->mtime_ns = 0;
        if ((uint8_t) header->mtime[0] & 0x80)
                r = parse_binary((const uint8_t *) header->mtime, sizeof header->mtime, &entry->mtime_s);
        else
                r = parse_octal(header->mtime, sizeof header->mtime, &entry->mtime_s);
        if (r < 0)
                return r;
        return entry->mtime_s > MTIME_MAX || entry->mtime_s < -MTIME_MAX ? -EBADMSG : 0;
}

static int take_header(const struct tar_header *header, const struct overrides *given, struct tar_entry *entry) {
        int64_t mode, uid, gid, size, major = 0, minor = 0;
        bool device = header->type == TAR_CHARACTER || header->type == TAR_BLOCK_DEVICE;
        int r;

        if (parse_number(header->mode, sizeof header->mode, INT32_MAX, &mode) < 0 ||
            parse_number(header->uid, sizeof header->uid, UINT32_MAX - 1, &uid) < 0 ||
            parse_number(header->gid, sizeof header->gid, UINT32_MAX - 1, &gid) < 0 ||
            parse_number(header->size, sizeof header->size, INT64_MAX, &size) < 0)
                return -EBADMSG;
        if (device && (parse_number(header->major, sizeof header->major, INT32_MAX, &major) < 0 ||
                       parse_number(header->minor, sizeof header->minor, INT32_MAX, &minor) < 0))
                return -EBADMSG;
        entry->type = header->type;
        entry->mode = (mode_t) mode & 07777;
        entry->major = (unsigned) major;
        entry->minor = (unsigned) minor;
        if (!given->uid)
                entry->uid = (uid_t) uid;
        if (!given->gid)
                entry->gid = (gid_t) gid;
        if (!given->size)
                entry->size = (uint64_t) size;
        if (!given->mtime && (r = take_mtime(header, entry)) < 0)
                return r;
        if (!given->path && (r = take_header_path(header, entry->path)) < 0)
                return r;
        if (!given->link && (r = take_name(entry->link, header->link, sizeof header->link)) < 0)
                return r;
        return 0;
}

/* A pax time is decimal, may be negative and may have a fraction. */
static int parse_pax_time(const char *text, struct tar_entry *entry) {
        bool negative = *text == '-';
        uint32_t ns = 0, unit = 100000000;
        int64_t seconds = 0;

        for (text += negative; *text >= '0' && *text <= '9'; text++) {
                seconds = seconds * 10 + (*text - '0');
                if (seconds > MTIME_MAX)
                        return -EBADMSG;
        }
        if (*text == '.')
                for (text++; *text >= '0' && *text <= '9'; text++) {
                        ns += (uint32_t) (*text - '0') * unit;
                        unit /= 10;
                }
        if (*text != 0)
                return -EBADMSG;
        entry->mtime_s = negative ? -seconds - (ns > 0) : seconds;
        entry->mtime_ns = negative && ns > 0 ? 1000000000 - ns : ns;
        return 0;
}

static int take_pax_name(char *target, bool *given, const char *value, size_t size) {
        if (memchr(value, 0, size))
                return -EBADMSG;
        *given = true;
        return take_name(target, value, size);
}

static int take_pax_id(uint32_t *target, bool *given, const char *value) {
        uint64_t id;

        if (parse_u64(value, 10, UINT32_MAX - 1, &id) < 0)
                return -EBADMSG;
        *target = (uint32_t) id;
        *given = true;
        return 0;
}

/* Keys we do not use (access times, user names, comments) are left out; the value is terminated. */
static int take_pax_record(const char *key, const char *value, size_t size, struct overrides *given,
                           struct tar_entry *entry) {
        if (strcmp(key, "path") == 0)
                return take_pax_name(entry->path, &given->path, value, size);
        if (strcmp(key, "linkpath") == 0)
                return take_pax_name(entry->link, &given->link, value, size);
        if (strcmp(key, "uid") == 0)
                return take_pax_id(&entry->uid, &given->uid, value);
        if (strcmp(key, "gid") == 0)
                return take_pax_id(&entry->gid, &given->gid, value);
        if (strcmp(key, "size") == 0) {
                given->size = true;
                return parse_u64(value, 10, INT64_MAX, &entry->size) < 0 ? -EBADMSG : 0;
        }
        if (strcmp(key, "mtime") == 0) {
                given->mtime = true;
                return parse_pax_time(value, entry);
        }
        if (strncmp(key, PAX_XATTR, strlen(PAX_XATTR)) == 0 && key[strlen(PAX_XATTR)] != 0) {
                const char *name = key + strlen(PAX_XATTR);

                return xattrs_add(&entry->xattrs, name, strlen(name), value, size);
        }
        return strncmp(key, "GNU.sparse.", 11) == 0 ? -EOPNOTSUPP : 0;
}

/* Records are "length key=value\n", where length counts the whole record. */
static int parse_pax(char *text, size_t size, struct overrides *given, struct tar_entry *entry) {
        while (size > 0) {
                char *space = memchr(text, ' ', min_size(size, 8)), *equals, *end;
                uint64_t length;
                int r;

                if (!space)
                        return -EBADMSG;
                *space = 0;
                if (parse_u64(text, 10, size, &length) < 0 || length < (uint64_t) (space - text) + 3)
                        return -EBADMSG;
                end = text + length - 1;
                equals = memchr(space + 1, '=', (size_t) (end - space - 1));
                if (*end != '\n' || !equals || memchr(space + 1, 0, (size_t) (equals - space - 1)))
                        return -EBADMSG;
                *equals = *end = 0;
                r = take_pax_record(space + 1, equals + 1, (size_t) (end - equals - 1), given, entry);
                if (r < 0)
                        return r;
                text += length;
                size -= length;
        }
        return 0;
}

/* Content of a header that describes the next member, terminated. */
static int read_meta(struct tar_reader *reader, uint64_t size) {
        int r;

        if (size > TAR_PAX_MAX)
                return -EMSGSIZE;
        r = read_exactly(reader, reader->pax, (size_t) size);
        if (r < 0)
                return r;
        reader->pax[size] = 0;
        return skip_bytes(reader, tar_padding(size));
}

static int read_long_name(struct tar_reader *reader, uint64_t size, char *target, bool *given) {
        int r = read_meta(reader, size);

        if (r < 0)
                return r;
        *given = true;
        return take_name(target, (const char *) reader->pax, (size_t) size);
}

/* Returns 1 when the header was one of those that describe the next member. */
static int take_meta(struct tar_reader *reader, const struct tar_header *header, struct overrides *given,
                     struct tar_entry *entry) {
        int64_t size;
        int r;

        if (!strchr("xgLK", header->type) || header->type == 0)
                return 0;
        if (parse_number(header->size, sizeof header->size, INT64_MAX, &size) < 0)
                return -EBADMSG;
        switch (header->type) {
        case 'L':
                r = read_long_name(reader, (uint64_t) size, entry->path, &given->path);
                break;
        case 'K':
                r = read_long_name(reader, (uint64_t) size, entry->link, &given->link);
                break;
        case 'g': /* for all that follows: comments in practice */
                r = read_meta(reader, (uint64_t) size);
                break;
        default:
                r = read_meta(reader, (uint64_t) size);
                if (r >= 0)
                        r = parse_pax((char *) reader->pax, (size_t) size, given, entry);
        }
        return r < 0 ? r : 1;
}

static int normalize(struct tar_reader *reader, struct tar_entry *entry) {
        size_t length = strlen(entry->path);

        if (entry->type == 0 || entry->type == '7')
                entry->type = TAR_FILE;
        /* Archives from before ustar mark directories by a slash only. */
        if (entry->type == TAR_FILE && length > 0 && entry->path[length - 1] == '/')
                entry->type = TAR_DIRECTORY;
        if (entry->type < TAR_FILE || entry->type > TAR_FIFO)
                return -EOPNOTSUPP;
        /* pax allows a hard link to carry its content; nobody writes that. */
        if (entry->type != TAR_FILE)
                entry->size = 0;
        reader->left = entry->size;
        reader->padding = tar_padding(entry->size);
        return 0;
}

static int read_header(struct tar_reader *reader, struct tar_header *ret) {
        static const struct tar_header zeros;
        int64_t checksum;
        int r = read_exactly(reader, ret, sizeof *ret);

        if (r < 0)
                return r;
        if (memcmp(ret, &zeros, sizeof zeros) == 0)
                return 0;
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION /* no fuzzer guesses a checksum */
        (void) checksum;
#else
        if (parse_octal(ret->checksum, sizeof ret->checksum, &checksum) < 0 || checksum != tar_checksum(ret))
                return -EBADMSG;
#endif
        return 1;
}

int tar_next(struct tar_reader *reader, struct tar_entry *ret) {
        struct overrides given = { 0 };
        struct tar_header header;
        int r = skip_bytes(reader, reader->left);

        if (r >= 0)
                r = skip_bytes(reader, reader->padding);
        reader->left = reader->padding = 0;
        ret->xattrs.used = 0;
        while (r >= 0) {
                r = read_header(reader, &header);
                if (r <= 0)
                        return r;
                r = take_meta(reader, &header, &given, ret);
                if (r > 0)
                        continue;
                if (r == 0)
                        r = take_header(&header, &given, ret);
                if (r >= 0)
                        r = normalize(reader, ret);
                return r < 0 ? r : 1;
        }
        return r;
}

int tar_content(struct tar_reader *reader, const uint8_t **ret_data, size_t *ret_size) {
        size_t wanted = reader->left > INT_MAX ? INT_MAX : (size_t) reader->left;
        int r;

        *ret_size = 0;
        if (wanted == 0)
                return 0;
        r = reader->source(reader->context, wanted, ret_data, ret_size);
        if (r < 0)
                return r;
        if (*ret_size == 0)
                return -EBADMSG;
        reader->left -= *ret_size;
        return 0;
}

int tar_finish(struct tar_reader *reader) {
        for (;;) {
                const uint8_t *data;
                size_t n;
                int r = reader->source(reader->context, INT_MAX, &data, &n);

                if (r < 0 || n == 0)
                        return r;
        }
}
