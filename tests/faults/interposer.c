/* Stands between a process and its C library (LD_PRELOAD), for tests: the disk fills up, fsync fails, the clock jumps.
 *
 * CDC_TEST_CONTROLS: a file that is mapped; who writes into it decides. CDC_TEST_DISK: the folder that is concerned.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct controls {
    int64_t clock_offset_seconds;
    int64_t disk_full;   /* writes fail with ENOSPC */
    int64_t fsync_fails; /* with EIO */
    int64_t no_room;     /* statvfs tells of no free block */
};

static const struct controls none;
static const volatile struct controls *controls = &none;
static const char *disk = "";

__attribute__((constructor)) static void begin(void)
{
    const char *file = getenv("CDC_TEST_CONTROLS"), *folder = getenv("CDC_TEST_DISK");
    int fd = file ? open(file, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0 || !folder)
        return;
    void *mapped = mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED) {
        controls = mapped;
        disk = folder;
    }
}

static int is_concerned(int fd)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    return size > 0 && !strncmp(path, disk, strlen(disk));
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define WRITES(name, parameters, arguments)                       \
    ssize_t name parameters                                       \
    {                                                             \
        static __typeof__(&name) real;                            \
        if (!real)                                                \
            real = REAL(name);                                    \
        if (controls->disk_full && is_concerned(fd)) {            \
            errno = ENOSPC;                                       \
            return -1;                                            \
        }                                                         \
        return real arguments;                                    \
    }

WRITES(write, (int fd, const void *data, size_t size), (fd, data, size))
WRITES(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRITES(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))

#define SYNCS(name)                                               \
    int name(int fd)                                              \
    {                                                             \
        static __typeof__(&name) real;                            \
        if (!real)                                                \
            real = REAL(name);                                    \
        if (controls->fsync_fails && is_concerned(fd)) {          \
            errno = EIO;                                          \
            return -1;                                            \
        }                                                         \
        return real(fd);                                          \
    }

SYNCS(fsync)
SYNCS(fdatasync)

#define ASKS(name, kind)                                          \
    int name(const char *path, struct kind *found)                \
    {                                                             \
        int result = REAL(name)(path, found);                     \
        if (!result && controls->no_room && !strncmp(path, disk, strlen(disk))) \
            found->f_bavail = 0;                                  \
        return result;                                            \
    }

ASKS(statvfs, statvfs)
ASKS(statvfs64, statvfs64)

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static __typeof__(&clock_gettime) real;
    if (!real)
        real = REAL(clock_gettime);
    int result = real(clock, now);
    if (!result && clock == CLOCK_REALTIME)
        now->tv_sec += controls->clock_offset_seconds;
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    int result = REAL(gettimeofday)(now, zone);
    if (!result && now)
        now->tv_sec += controls->clock_offset_seconds;
    return result;
}

time_t time(time_t *now)
{
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now)
        *now = found.tv_sec;
    return found.tv_sec;
}
