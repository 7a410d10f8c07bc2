/* SPDX-License-Identifier: MIT */
/* The wire format: frames of a length, a type and a payload; payloads of tagged fields. No input or output here.
 * README.md beside this file is the reference; src/banger/contract/guest.py is the other end. */
#pragma once

#include <stdbool.h>

#include "macro.h"

#define PROTO_MAGIC "banger-guest"

enum {
        PROTO_VERSION_MIN = 1,
        PROTO_VERSION_MAX = 1,
        FRAME_HEADER_SIZE = 5,
        FRAME_PAYLOAD_MAX = 64 * 1024,
        FIELD_HEADER_SIZE = 5,
        REQUEST_SIZE_MAX = 1024 * 1024,
        STDIN_WINDOW = 256 * 1024,
        VSOCK_PORT = 1023,
        PULSE_PORT = 1021, /* gives back each byte */
};

enum frame_type {
        FRAME_HELLO = 0x01,
        FRAME_ERROR = 0x02,
        FRAME_WINDOW = 0x03,
        FRAME_DATA = 0x04,
        FRAME_MORE = 0x05,
        FRAME_REPLY = 0x06,
        FRAME_ENTRY = 0x07,

        FRAME_HEALTH = 0x10,
        FRAME_EXEC = 0x11,
        FRAME_PUT = 0x12,
        FRAME_GET = 0x13,
        FRAME_PORTS = 0x14,
        FRAME_FLUSH = 0x15,
        FRAME_POWER_OFF = 0x16,
        FRAME_TIME = 0x17,
        FRAME_CONNECT = 0x18,

        FRAME_STARTED = 0x20,
        FRAME_STDIN = 0x21,
        FRAME_STDOUT = 0x22,
        FRAME_STDERR = 0x23,
        FRAME_RESIZE = 0x24,
        FRAME_SIGNAL = 0x25,
        FRAME_EXIT = 0x26,
};

enum tag {
        TAG_MAGIC = 1,
        TAG_VERSION = 2,
        TAG_VERSION_MIN = 3,
        TAG_VERSION_MAX = 4,
        TAG_AGENT_VERSION = 5,
        TAG_BOOT_ID = 6,
        TAG_CODE = 10,
        TAG_MESSAGE = 11,
        TAG_COUNT = 12,

        TAG_ARGUMENT = 20,
        TAG_ENVIRONMENT = 21,
        TAG_DIRECTORY = 22,
        TAG_USER = 23,
        TAG_TTY = 24,
        TAG_STDIN = 25,
        TAG_ROWS = 26,
        TAG_COLUMNS = 27,
        TAG_SIGNAL = 28,
        TAG_PID = 29,
        TAG_EXIT_KIND = 30,
        TAG_EXIT_CODE = 31,

        TAG_PATH = 40,
        TAG_UID = 41,
        TAG_GID = 42,
        TAG_STRIP = 43,
        TAG_FOLLOW_LINKS = 44,
        TAG_MAKE_DIRECTORY = 45,
        TAG_ONE_FILE_SYSTEM = 46,
        TAG_ENTRIES = 47,
        TAG_BYTES = 48,
        TAG_SHRUNK = 49,
        TAG_SHRUNK_COUNT = 50,

        TAG_UPTIME_MS = 60,
        TAG_AGENT_PID = 61,
        TAG_INIT_KIND = 62,
        TAG_INIT_FINISHED = 63,
        TAG_REALTIME_NS = 64,
        TAG_RSS_BYTES = 65,
        TAG_MEMORY_TOTAL_BYTES = 66,
        TAG_MEMORY_AVAILABLE_BYTES = 67,
        TAG_LOAD_MILLI = 68,
        TAG_FAILED_MOUNT = 69,

        TAG_PROTOCOL = 80,
        TAG_ADDRESS = 81,
        TAG_PORT = 82,
        TAG_PROCESS = 83,

        TAG_GRACE_MS = 90,
};

enum { EXIT_KIND_EXITED = 0, EXIT_KIND_SIGNALED = 1 };

void frame_header_write(uint8_t *header, uint8_t type, size_t size);
int frame_header_read(const uint8_t *header, uint8_t *ret_type, size_t *ret_size);

/* Walks over the fields of a payload. The payload is changed by field_string(). */
struct fields {
        uint8_t *next, *end;
};

struct field {
        uint8_t tag;
        uint8_t *data;
        size_t size;
};

int fields_next(struct fields *fields, struct field *ret);
int field_u64(const struct field *field, uint64_t max, uint64_t *ret);
int field_bool(const struct field *field, bool *ret);
int field_string(const struct field *field, char **ret);

/* Builds a payload; when it does not fit, full is set and the rest is left out. */
struct builder {
        size_t used;
        bool full;
        uint8_t data[8192];
};

void builder_bytes(struct builder *builder, uint8_t tag, const void *data, size_t size);
void builder_string(struct builder *builder, uint8_t tag, const char *text);
void builder_u64(struct builder *builder, uint8_t tag, uint64_t value);
