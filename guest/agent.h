/* SPDX-License-Identifier: MIT */
/* The agent: accepts connections and gives each a process of its own. */
#pragma once

#include "conn.h"

int agent_main(int argc, char **argv);

/* Serves one connection to its end; when busy, it only says so. */
int serve_connection(struct conn *conn, bool busy);

/* Without the '@' of its name systemd ends this process with all the others. */
void give_up_protection(char *name);

int serve_health(struct conn *conn, struct frame *frame);
int serve_ports(struct conn *conn, struct frame *frame);
int serve_put(struct conn *conn, struct frame *frame);
int serve_get(struct conn *conn, struct frame *frame);
int serve_flush(struct conn *conn, struct frame *frame);
int serve_power_off(struct conn *conn, struct frame *frame);
int serve_time(struct conn *conn, struct frame *frame);
