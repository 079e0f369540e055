// SPDX-License-Identifier: GPL-2.0
#include <linux/module.h>

static int __init works_init(void) { return 0; }
static void __exit works_exit(void) {}

module_init(works_init);
module_exit(works_exit);
MODULE_DESCRIPTION("built in a jail");
MODULE_LICENSE("GPL");
