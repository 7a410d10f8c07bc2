/* SPDX-License-Identifier: MIT */
/* A command's input: at most a window of bytes on their way from the client to it. */
#pragma once

#include "proto.h"

struct exec_input {
        int fd; /* -1 when it is closed; what still comes is swallowed */
        bool tty;
        bool expected, ended, line_open;
        bool ending; /* what is in the ring is the end of a terminal's input, nothing of the client's */
        size_t start, used; /* in the ring */
        size_t window_used; /* bytes that the client may not send again before a grant */
        size_t grant;
};

/* Takes a STDIN frame. Returns NULL, or what is wrong with it. */
const char *exec_input_take(struct exec_input *input, const uint8_t *data, size_t size);

/* Hands the command what it takes now. */
void exec_input_feed(struct exec_input *input);

/* Closes the input once the client has ended it and the command has it all. */
void exec_input_finish(struct exec_input *input);

/* Returns how many bytes a WINDOW frame gives back now; 0 while that is not worth a frame. */
size_t exec_input_grant(struct exec_input *input);
