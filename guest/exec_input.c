/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <string.h>
#include <termios.h>

#include "exec_input.h"

enum { GRANT_STEP = STDIN_WINDOW / 4 }; /* worth a frame */

/* A process serves one command. */
static uint8_t ring[STDIN_WINDOW];

static void store(struct exec_input *input, const uint8_t *data, size_t size) {
        size_t end = (input->start + input->used) % sizeof ring;

        for (size_t done = 0; done < size;) {
                size_t n = min_size(size - done, sizeof ring - end);

                memcpy(ring + end, data + done, n);
                end = (end + n) % sizeof ring;
                done += n;
        }
        input->used += size;
}

const char *exec_input_take(struct exec_input *input, const uint8_t *data, size_t size) {
        if (!input->expected || input->ended)
                return "input that was not asked for";
        if (size > STDIN_WINDOW - input->window_used)
                return "input beyond the window";
        if (size == 0)
                input->ended = true;
        input->window_used += size;
        if (input->fd < 0)
                input->grant += size;
        else
                store(input, data, size);
        return NULL;
}

static void give_back(struct exec_input *input, size_t size) {
        if (!input->ending)
                input->grant += size;
}

void exec_input_feed(struct exec_input *input) {
        ssize_t n = write(input->fd, ring + input->start, min_size(input->used, sizeof ring - input->start));

        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
        if (n < 0) {
                /* The command has closed its input: swallow the rest, so that the client is not stuck with it. */
                give_back(input, input->used);
                input->used = 0;
                close_fdp(&input->fd);
                return;
        }
        input->line_open = ring[input->start + (size_t) n - 1] != '\n';
        input->start = (input->start + (size_t) n) % sizeof ring;
        input->used -= (size_t) n;
        give_back(input, (size_t) n);
}

/* On a terminal the end of input is a character, and it only ends the input at the start of a line. Like all input it
 * may have to wait for room. */
static void end_tty_input(struct exec_input *input) {
        struct termios modes;
        uint8_t end[2];

        input->ending = true;
        if (tcgetattr(input->fd, &modes) < 0 || !(modes.c_lflag & ICANON))
                return;
        end[0] = end[1] = modes.c_cc[VEOF];
        store(input, end, input->line_open ? 2 : 1);
}

void exec_input_finish(struct exec_input *input) {
        if (!input->ended || input->used > 0 || input->fd < 0)
                return;
        if (input->tty && !input->ending)
                end_tty_input(input);
        if (input->used == 0)
                close_fdp(&input->fd);
}

size_t exec_input_grant(struct exec_input *input) {
        size_t grant = input->grant;

        if (grant < GRANT_STEP)
                return 0;
        input->window_used -= grant;
        input->grant = 0;
        return grant;
}
