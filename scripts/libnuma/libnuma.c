/* libnuma.so.1 for machines that have none.
 *
 * vLLM's CPU kernels link libnuma to bind memory to the node that their threads run on. This library exports the functions that they
 * ask for and says that there is no NUMA; then they bind threads only and call none of the others. It is no implementation of
 * libnuma: set-up puts it into vLLM's own environment, where it is loaded only if the system's library cannot be.
 *
 * Built on x86-64, without any other library, by
 *   gcc -shared -fPIC -Os -s -nostdlib -Wl,-soname,libnuma.so.1 -Wl,--version-script=libnuma.map -Wl,--build-id=none \
 *       -Wl,-z,noseparate-code -o libnuma-x86_64.so.1 libnuma.c
 */

struct bitmask;

int numa_available(void) { return -1; }

/* Never called after that answer. */
int numa_migrate_pages(int pid, struct bitmask *from, struct bitmask *to) { return -1; }
struct bitmask *numa_get_mems_allowed(void) { return 0; }
struct bitmask *numa_parse_nodestring(const char *text) { return 0; }
void numa_bitmask_free(struct bitmask *mask) {}
void numa_set_interleave_mask(struct bitmask *mask) {}
void numa_set_membind(struct bitmask *mask) {}
void numa_set_strict(int flag) {}
