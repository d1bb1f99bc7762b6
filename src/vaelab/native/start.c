/* What must be asked of the operating system before the tiles may be used: Linux saves their 8 KiB for a process only
   where it asks (arch_prctl(2), ARCH_REQ_XCOMP_PERM). */

#include <sys/syscall.h>
#include <unistd.h>

int vaelab_begin(void) {
#ifdef __AMX_BF16__
    return (int)syscall(SYS_arch_prctl, 0x1023, 18);
#else
    return 0;
#endif
}

/* Whether products are those of the tiles. */
int vaelab_tiles(void) {
#ifdef __AMX_BF16__
    return 1;
#else
    return 0;
#endif
}
