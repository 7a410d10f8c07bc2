/* SPDX-License-Identifier: MIT */
/* What systemd is told before it becomes process 1. */
#pragma once

#include <stdbool.h>

#include "macro.h"

/* True for systemd itself and for a link to it. */
bool systemd_is(const char *program);

/* Writes units below /run, which those in /etc of the image go before. */
void systemd_prepare(void);
