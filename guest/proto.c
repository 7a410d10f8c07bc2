/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <string.h>

#include "proto.h"

static void u32_write(uint8_t *p, uint32_t value) {
        for (int i = 0; i < 4; i++)
                p[i] = (uint8_t) (value >> (8 * i));
}

static uint32_t u32_read(const uint8_t *p) {
        return (uint32_t) p[0] | (uint32_t) p[1] << 8 | (uint32_t) p[2] << 16 | (uint32_t) p[3] << 24;
}

void frame_header_write(uint8_t *header, uint8_t type, size_t size) {
        u32_write(header, (uint32_t) size);
        header[4] = type;
}

int frame_header_read(const uint8_t *header, uint8_t *ret_type, size_t *ret_size) {
        uint32_t size = u32_read(header);

        if (size > FRAME_PAYLOAD_MAX)
                return -EMSGSIZE;
        *ret_size = size;
        *ret_type = header[4];
        return 0;
}

/* Returns 1 with a field, 0 at the end, -EBADMSG when the payload is malformed. */
int fields_next(struct fields *fields, struct field *ret) {
        size_t left = (size_t) (fields->end - fields->next);
        uint32_t size;

        if (left == 0)
                return 0;
        if (left < FIELD_HEADER_SIZE)
                return -EBADMSG;
        size = u32_read(fields->next + 1);
        if (size > left - FIELD_HEADER_SIZE)
                return -EBADMSG;
        *ret = (struct field) {
                .tag = fields->next[0],
                .data = fields->next + FIELD_HEADER_SIZE,
                .size = size,
        };
        fields->next += FIELD_HEADER_SIZE + size;
        return 1;
}

int field_u64(const struct field *field, uint64_t max, uint64_t *ret) {
        uint64_t value;

        if (field->size != 8)
                return -EBADMSG;
        value = u32_read(field->data) | (uint64_t) u32_read(field->data + 4) << 32;
        if (value > max)
                return -EBADMSG;
        *ret = value;
        return 0;
}

int field_bool(const struct field *field, bool *ret) {
        uint64_t value;
        int r = field_u64(field, 1, &value);

        if (r < 0)
                return r;
        *ret = value != 0;
        return 0;
}

/* Makes room for the terminator by moving the value over the last byte of its own header, which has been read. */
int field_string(const struct field *field, char **ret) {
        if (memchr(field->data, 0, field->size))
                return -EBADMSG;
        memmove(field->data - 1, field->data, field->size);
        field->data[(ptrdiff_t) field->size - 1] = 0;
        *ret = (char *) field->data - 1;
        return 0;
}

void builder_bytes(struct builder *builder, uint8_t tag, const void *data, size_t size) {
        if (builder->full || size > sizeof builder->data - FIELD_HEADER_SIZE ||
            builder->used > sizeof builder->data - FIELD_HEADER_SIZE - size) {
                builder->full = true;
                return;
        }
        builder->data[builder->used] = tag;
        u32_write(builder->data + builder->used + 1, (uint32_t) size);
        memcpy(builder->data + builder->used + FIELD_HEADER_SIZE, data, size);
        builder->used += FIELD_HEADER_SIZE + size;
}

void builder_string(struct builder *builder, uint8_t tag, const char *text) {
        builder_bytes(builder, tag, text, strlen(text));
}

void builder_u64(struct builder *builder, uint8_t tag, uint64_t value) {
        uint8_t bytes[8];

        u32_write(bytes, (uint32_t) value);
        u32_write(bytes + 4, (uint32_t) (value >> 32));
        builder_bytes(builder, tag, bytes, sizeof bytes);
}
