/* SPDX-License-Identifier: MIT */
/* Running a program for the host: parsing the request, starting the process, moving its data. */
#pragma once

#include "conn.h"
#include "user.h"

struct exec_request {
        char **arguments;
        size_t argument_count;
        char **environment; /* as given, without the defaults */
        size_t environment_count;
        char *directory; /* NULL: the user's home */
        char *user;      /* NULL: root */
        bool tty;
        bool stdin_open;
        uint16_t rows, columns;
};

/* Our ends of a started process. A tty has one descriptor for both directions: input is a duplicate of output[0]. */
struct exec_process {
        pid_t pid;
        int input;     /* -1 when the process has no input from us */
        int output[2]; /* stdout, stderr */
        int status;    /* readable: a struct exec_failure, or end of file once the program runs */
};

struct exec_failure {
        int error;
        char what[24];
};

int exec_request_parse(uint8_t *payload, size_t size, struct exec_request *ret);
void exec_request_free(struct exec_request *request);

int exec_spawn(const struct exec_request *request, const struct user *user, struct exec_process *ret);

/* Serves the connection until the process is gone; signal_fd reports SIGCHLD. */
int exec_pump(struct conn *conn, const struct exec_request *request, struct exec_process *process, int signal_fd);

int serve_exec(struct conn *conn, struct frame *frame);
