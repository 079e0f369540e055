// SPDX-License-Identifier: Apache-2.0

package local

import (
	"net/http"

	"github.com/google/uuid"
)

var keyFields = []field{
	{name: "name", required: true, check: nonBlank("name field must not be blank")},
	{name: "public_key", required: true, check: nonBlank("public_key field must not be blank")},
}

// undeleteFields is the body of PATCH on deleted records; the service says
// "Recipe type" for keys and images, too.
var undeleteFields = []field{
	{name: "operation", required: true, check: oneOf("Recipe type must be one of: ", "undelete")},
}

func (a *api) listKeys(c *call) { a.reply(c, a.state.keys.all()) }

func (a *api) createKey(c *call) {
	in, ok := a.validated(c, keyFields)
	if !ok {
		return
	}
	key := PublicKey{Name: in["name"].(string), PublicKey: in["public_key"].(string), ID: uuid.NewString(), Created: now()}
	if err := a.state.keys.put(key); err != nil {
		a.internal(c, err)
		return
	}
	a.answer(c.w, http.StatusCreated, key)
}

func (a *api) getKey(c *call) {
	if key, ok := a.state.keys.get(c.id); ok {
		a.reply(c, key)
		return
	}
	a.notFound(c)
}

func (a *api) deleteKey(c *call) {
	key, ok := a.state.keys.get(c.id)
	if !ok {
		a.notFound(c)
		return
	}
	a.finish(c, a.dropKeys([]PublicKey{key}, c.v3))
}

func (a *api) deleteKeys(c *call) { a.finish(c, a.dropKeys(a.state.keys.all(), c.v3)) }

// dropKeys deletes records; on v3 they stay as deleted records.
func (a *api) dropKeys(keys []PublicKey, keep bool) error {
	for _, key := range keys {
		if keep {
			key.Deleted = now()
			if err := a.state.deletedKeys.put(key); err != nil {
				return err
			}
		}
		if err := a.state.keys.remove(key.ID); err != nil {
			return err
		}
	}
	return nil
}

func (a *api) listDeletedKeys(c *call) { a.reply(c, a.state.deletedKeys.all()) }

func (a *api) getDeletedKey(c *call) {
	if key, ok := a.state.deletedKeys.get(c.id); ok {
		a.reply(c, key)
		return
	}
	a.notFound(c)
}

// chosenKeys is the deleted key of the path, or all of them on the collection.
func (a *api) chosenKeys(c *call) ([]PublicKey, bool) {
	if c.id == "" {
		return a.state.deletedKeys.all(), true
	}
	key, ok := a.state.deletedKeys.get(c.id)
	if !ok {
		a.notFound(c)
	}
	return []PublicKey{key}, ok
}

func (a *api) undeleteKeys(c *call) {
	keys, ok := a.chosenKeys(c)
	if !ok {
		return
	}
	if _, ok := a.validated(c, undeleteFields); !ok {
		return
	}
	for _, key := range keys {
		key.Deleted = ""
		if err := a.state.keys.put(key); err != nil {
			a.internal(c, err)
			return
		}
		if err := a.state.deletedKeys.remove(key.ID); err != nil {
			a.internal(c, err)
			return
		}
	}
	a.noContent(c)
}

func (a *api) purgeKeys(c *call) {
	keys, ok := a.chosenKeys(c)
	if !ok {
		return
	}
	for _, key := range keys {
		if err := a.state.deletedKeys.remove(key.ID); err != nil {
			a.internal(c, err)
			return
		}
	}
	a.noContent(c)
}

// finish answers 204, or what err asks for.
func (a *api) finish(c *call, err error) {
	if err != nil {
		a.refuse(c, err)
		return
	}
	a.noContent(c)
}
