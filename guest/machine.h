/* SPDX-License-Identifier: MIT */
/* What the agent knows of the machine that it runs in. */
#pragma once

#include <stdbool.h>

#include "macro.h"

enum { BOOT_ID_SIZE = 37 };

enum init_kind { INIT_OWN, INIT_SYSTEMD, INIT_BUSYBOX, INIT_OTHER };

void machine_boot_id(char *ret);
enum init_kind machine_init_kind(void);
const char *init_kind_name(enum init_kind kind);

/* True when process 1 has sent READY=1. */
bool machine_read_notification(int fd);
