/* Prints the effective user: critest's image "nonewprivs" runs it as a user with the set-uid bit. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
    printf("Effective uid: %d\n", (int)geteuid());
    return 0;
}
