// SPDX-License-Identifier: Apache-2.0

package local

import "io"

func containerChild(stdin io.Reader) int { return 125 }
