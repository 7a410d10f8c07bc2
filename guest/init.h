/* SPDX-License-Identifier: MIT */
/* Process 1: makes the machine usable, starts the agent, then becomes the image's own init if there is one. */
#pragma once

#include "macro.h"

int init_main(void);

/* In an initramfs of ours: load modules, mount the root disk, go there. Returns only on failure. */
#define INITRAMFS_MODULES "/banger-modules"
int initramfs_main(void);

/* Both for init and initramfs. */
void init_mount_kernel_file_systems(void);
int init_wait_for(const char *path, unsigned limit_ms);
