/* SPDX-License-Identifier: MIT */
/* Any bytes as a stream of frames, and their payloads as fields, an exec request and a connect request. */
#include <stdlib.h>
#include <string.h>

#include "connect.h"
#include "exec.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_fields(uint8_t *payload, size_t size) {
        struct fields fields = { .next = payload, .end = payload + size };
        struct field field;

        while (fields_next(&fields, &field) > 0) {
                uint64_t number;
                bool flag;
                char *text;

                (void) field_u64(&field, UINT32_MAX, &number);
                (void) field_bool(&field, &flag);
                if (field_string(&field, &text) == 0 && strlen(text) != field.size)
                        abort();
        }
}

static void read_exec(uint8_t *payload, size_t size) {
        struct exec_request request;

        if (exec_request_parse(payload, size, &request) < 0)
                return;
        for (size_t i = 0; i <= request.argument_count; i++)
                if (!request.arguments[i] != (i == request.argument_count))
                        abort();
        exec_request_free(&request);
}

static void read_connect(uint8_t *payload, size_t size) {
        struct connect_request request;

        if (connect_request_parse(payload, size, &request) == 0 &&
            (request.port == 0 || (request.address_given && request.address.any.sa_family == AF_UNSPEC)))
                abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
        while (size >= FRAME_HEADER_SIZE) {
                size_t length;
                uint8_t type, *copy;

                if (frame_header_read(data, &type, &length) < 0)
                        return 0;
                data += FRAME_HEADER_SIZE;
                size -= FRAME_HEADER_SIZE;
                length = min_size(length, size);
                copy = malloc(length + 1); /* of its own, so that a step outside is seen */
                memcpy(copy, data, length);
                if (type == FRAME_EXEC)
                        read_exec(copy, length);
                else if (type == FRAME_CONNECT)
                        read_connect(copy, length);
                else
                        read_fields(copy, length);
                free(copy);
                data += length;
                size -= length;
        }
        return 0;
}
