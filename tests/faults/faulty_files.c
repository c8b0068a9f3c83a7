/* Faults in file operations below one directory, at the level of libc: LD_PRELOAD this, steer it through a shared page.
 *
 * The page (XMTF_FAULT_CONTROL, four int64): operations counted so far, the one to fault (from 1; 0: none), the mode,
 * the errno. Operations of all processes are counted together. Only paths below XMTF_FAULT_ROOT count:
 * opening for writing, write (also of stdio, which NumPy writes through, and of the kernel's own copying), fsync,
 * ftruncate, rename, mkdir, unlink, rmdir.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAIL_ONCE = 1, FAIL_FOREVER = 2, SHORT_WRITE = 3, KILL = 4 };
struct control { int64_t count, target, mode, error; };

static struct control *page(void) {
    static struct control *mapped;
    if (!mapped) {
        const char *name = getenv("XMTF_FAULT_CONTROL");
        if (!name) return NULL;
        int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
        int descriptor = real_open(name, O_RDWR);
        if (descriptor < 0) return NULL;
        void *found = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
        close(descriptor);
        if (found == MAP_FAILED) return NULL;
        mapped = found;
    }
    return mapped;
}

static int below(const char *path) {
    const char *root = getenv("XMTF_FAULT_ROOT");
    return root && path && strncmp(path, root, strlen(root)) == 0;
}

static int descriptor_below(int descriptor) {
    char link[64], path[4096];
    ssize_t length;
    strcpy(link, "/proc/self/fd/");
    char digits[16];
    int at = 0, number = descriptor;
    if (descriptor < 0) return 0;
    do { digits[at++] = '0' + number % 10; number /= 10; } while (number);
    size_t end = strlen(link);
    while (at) link[end++] = digits[--at];
    link[end] = 0;
    length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

/* Count an operation; return the mode if it is to be faulted, with errno set. */
static int fault(void) {
    struct control *control = page();
    if (!control) return 0;
    int64_t number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    int hit = control->target && (number == control->target ||
                                  (control->mode == FAIL_FOREVER && number > control->target));
    if (!hit) return 0;
    if (control->mode == KILL) kill(getpid(), SIGKILL);
    errno = (int)control->error;
    return (int)control->mode;
}

#define FAILS(inside) ({ int mode_ = (inside) ? fault() : 0; mode_ == FAIL_ONCE || mode_ == FAIL_FOREVER; })
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))

#define OPEN(name)                                                                        \
    int name(const char *path, int flags, ...) {                                          \
        mode_t mode = 0;                                                                  \
        if (flags & O_CREAT) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
        if (FAILS(WRITES(flags) && below(path))) return -1;                               \
        return REAL(name)(path, flags, mode);                                             \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                      \
    int name(int directory, const char *path, int flags, ...) {                           \
        mode_t mode = 0;                                                                  \
        if (flags & O_CREAT) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
        if (FAILS(WRITES(flags) && (path[0] == '/' ? below(path) : descriptor_below(directory)))) return -1; \
        return REAL(name)(directory, path, flags, mode);                                  \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int descriptor, const void *data, size_t count) {
    int mode = descriptor_below(descriptor) ? fault() : 0;
    if (mode == FAIL_ONCE || mode == FAIL_FOREVER) return -1;
    if (mode == SHORT_WRITE && count > 1) count /= 2;
    return REAL(write)(descriptor, data, count);
}

#define PWRITE(name, offset_type)                                                         \
    ssize_t name(int descriptor, const void *data, size_t count, offset_type at) {        \
        int mode = descriptor_below(descriptor) ? fault() : 0;                            \
        if (mode == FAIL_ONCE || mode == FAIL_FOREVER) return -1;                         \
        if (mode == SHORT_WRITE && count > 1) count /= 2;                                 \
        return REAL(name)(descriptor, data, count, at);                                   \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    int mode = descriptor_below(descriptor) ? fault() : 0;
    if (mode == FAIL_ONCE || mode == FAIL_FOREVER) return -1;
    if (mode == SHORT_WRITE && count > 1) count /= 2;
    return REAL(writev)(descriptor, parts, count);
}

/* A vector of one part, as Python's os.pwritev gives it; with its flags through pwritev2. */
#define PWRITEV(name, offset_type)                                                        \
    ssize_t name(int descriptor, const struct iovec *parts, int count, offset_type at) {  \
        int mode = descriptor_below(descriptor) ? fault() : 0;                            \
        if (mode == FAIL_ONCE || mode == FAIL_FOREVER) return -1;                         \
        struct iovec first = parts[0];                                                    \
        if (mode != SHORT_WRITE || first.iov_len < 2) return REAL(name)(descriptor, parts, count, at); \
        first.iov_len /= 2;                                                               \
        return REAL(name)(descriptor, &first, 1, at);                                     \
    }
PWRITEV(pwritev, off_t)
PWRITEV(pwritev64, off64_t)

#define PWRITEV2(name, offset_type)                                                       \
    ssize_t name(int descriptor, const struct iovec *parts, int count, offset_type at, int flags) { \
        int mode = descriptor_below(descriptor) ? fault() : 0;                            \
        if (mode == FAIL_ONCE || mode == FAIL_FOREVER) return -1;                         \
        struct iovec first = parts[0];                                                    \
        if (mode != SHORT_WRITE || first.iov_len < 2) return REAL(name)(descriptor, parts, count, at, flags); \
        first.iov_len /= 2;                                                               \
        return REAL(name)(descriptor, &first, 1, at, flags);                              \
    }
PWRITEV2(pwritev2, off_t)
PWRITEV2(pwritev64v2, off64_t)

/* stdio writes through a call of its own that nobody can interpose; what fails here fails for its caller alike. */
size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
    return FAILS(descriptor_below(fileno(stream))) ? 0 : REAL(fwrite)(data, size, count, stream);
}

#define FOPEN(name)                                                                       \
    FILE *name(const char *path, const char *how) {                                       \
        if (FAILS(strpbrk(how, "wa+") && below(path))) return NULL;                       \
        return REAL(name)(path, how);                                                     \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define SENDFILE(name, offset_type)                                                       \
    ssize_t name(int to, int from, offset_type *at, size_t count) {                       \
        int mode = descriptor_below(to) ? fault() : 0;                                    \
        if (mode == FAIL_ONCE || mode == FAIL_FOREVER) return -1;                         \
        if (mode == SHORT_WRITE && count > 1) count = count > 64 ? 64 : count / 2;        \
        return REAL(name)(to, from, at, count);                                           \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t count, unsigned flags) {
    int mode = descriptor_below(to) ? fault() : 0;
    if (mode == FAIL_ONCE || mode == FAIL_FOREVER) return -1;
    if (mode == SHORT_WRITE && count > 1) count /= 2;
    return REAL(copy_file_range)(from, from_at, to, to_at, count, flags);
}

int fsync(int descriptor) {
    return FAILS(descriptor_below(descriptor)) ? -1 : REAL(fsync)(descriptor);
}

int fdatasync(int descriptor) {
    return FAILS(descriptor_below(descriptor)) ? -1 : REAL(fdatasync)(descriptor);
}

int ftruncate(int descriptor, off_t length) {
    return FAILS(descriptor_below(descriptor)) ? -1 : REAL(ftruncate)(descriptor, length);
}

int ftruncate64(int descriptor, off64_t length) {
    return FAILS(descriptor_below(descriptor)) ? -1 : REAL(ftruncate64)(descriptor, length);
}

int rename(const char *from, const char *to) {
    return FAILS(below(to)) ? -1 : REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) {
    return FAILS(below(path)) ? -1 : REAL(mkdir)(path, mode);
}

int unlink(const char *path) {
    return FAILS(below(path)) ? -1 : REAL(unlink)(path);
}

int rmdir(const char *path) {
    return FAILS(below(path)) ? -1 : REAL(rmdir)(path);
}

int unlinkat(int directory, const char *path, int flags) {
    return FAILS(path[0] == '/' ? below(path) : descriptor_below(directory)) ? -1
                                                                             : REAL(unlinkat)(directory, path, flags);
}
