/* SPDX-License-Identifier: MIT */
/* A kernel without a serial console cannot tell the host that it panicked: its VMM ends as after an orderly end. So we
 * tell of an orderly end, on that port, which such a kernel leaves alone; one that comes without a word is another. */
#pragma once

#include "macro.h"

/* Tells that the machine goes down. */
void goodbye_say(void);

/* Tells the host that it will be told, waits to be ended as every process is at the end, and tells. */
void _Noreturn goodbye_wait(void);
