/* SPDX-License-Identifier: MIT */
/* A connection from the host to a port of the guest: parsing the request, moving its data. */
#pragma once

#include <netinet/in.h>

#include "conn.h"

union connect_address {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
};

struct connect_request {
        bool datagrams; /* udp: each DATA frame is one datagram */
        bool address_given;
        uint16_t port;
        union connect_address address; /* without its port */
};

int connect_request_parse(uint8_t *payload, size_t size, struct connect_request *ret);

/* Serves the connection until both sides have ended; fd is a connected, non-blocking socket. */
int connect_pump(struct conn *conn, int fd, bool datagrams);

int serve_connect(struct conn *conn, struct frame *frame);
